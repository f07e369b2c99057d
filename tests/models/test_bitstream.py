from __future__ import annotations

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest

from models.bitstream import GAIN_RANGE_DB, MAX_SAMPLES, Stream, pack, read, unpack, write


def frames_of(samples: int) -> int:
    return math.ceil(samples / 48_000) + 1


def make_stream(*, samples: int = 240_000, channels: int = 1, books: int = 12, size: int = 256) -> Stream:
    shape = (channels, frames_of(samples), books)
    codes = np.random.default_rng(0).integers(0, size, shape)
    return Stream("0123abcd", samples, channels, books, size, gain_db=-7.5, codes=codes)


def test_packing_is_most_significant_bit_first_and_pads_the_last_byte_with_zeros():
    assert pack(np.array([[0b101, 0b001], [0b111, 0b110]]), 8) == bytes([0b10100111, 0b11100000])


@pytest.mark.parametrize("code_bits", [1, 3, 7, 8, 10, 12, 16, 31])
@pytest.mark.parametrize("frames", [0, 1, 7, 100])
def test_packing_round_trips_in_exactly_the_bits_that_the_codes_take(code_bits, frames):
    codes = np.random.default_rng(code_bits).integers(0, 2**code_bits, (frames, 5))
    codes[: frames // 2] = 2**code_bits - 1
    data = pack(codes, 2**code_bits)
    assert len(data) == math.ceil(frames * 5 * code_bits / 8)
    restored = unpack(data, frames, 5, 2**code_bits)
    assert restored.dtype == np.int64
    assert np.array_equal(restored, codes)


def test_narrow_integers_pack_as_wide_ones():
    codes = np.arange(200).reshape(40, 5)
    assert pack(codes.astype(np.uint8), 4096) == pack(codes, 4096)


@pytest.mark.parametrize(
    ("codes", "size"),
    [
        (np.array([[256]]), 256),
        (np.array([[-1]]), 256),
        (np.array([[1.0]]), 256),
        (np.array([1]), 256),
        (np.array([[1]]), 255),
        (np.array([[0]]), 1),
        (np.array([[0]]), 0),
        (np.array([[0]]), 2**32),
    ],
)
def test_packing_refuses_what_does_not_fit(codes, size):
    with pytest.raises(ValueError, match="code"):
        pack(codes, size)


@pytest.mark.parametrize("length", [0, 59, 61])
def test_unpacking_refuses_data_of_another_length(length):
    with pytest.raises(ValueError, match=f"take 60 bytes, not {length}"):
        unpack(bytes(length), 5, 12, 256)


@pytest.mark.parametrize("samples", [0, 1, 127, 128, 47_999, 240_000, 100 * 48_000])
@pytest.mark.parametrize(("channels", "books", "size"), [(1, 12, 256), (2, 25, 4096), (8, 1, 2), (1, 255, 2**31)])
def test_a_file_gives_back_what_was_written(samples, channels, books, size):
    stream = make_stream(samples=samples, channels=channels, books=books, size=size)
    data = write(stream)
    back = read(data, frames_of=frames_of)
    assert np.array_equal(back.codes, stream.codes)
    assert (back.model, back.samples, back.gain_db) == (stream.model, stream.samples, stream.gain_db)
    assert (back.channels, back.books, back.size) == (channels, books, size)
    assert write(back) == data


def test_the_payload_is_exact_and_the_rest_small():
    five_seconds = make_stream()  # 1 Hz · 12 books · 8 bits = 96 bits/s, with the frame at the end 6 vectors
    assert len(write(five_seconds)) == 6 * 12 + 18


@pytest.mark.parametrize(("gain", "stored"), [(0, 0), (0.3, 0.5), (-0.2, 0), (-64, -64), (63.5, 63.5), (-12.8, -13)])
def test_gain_is_kept_to_half_a_decibel(gain, stored):
    assert read(write(replace(make_stream(), gain_db=gain)), frames_of=frames_of).gain_db == stored


def test_a_longer_hash_is_stored_by_its_beginning():
    stream = replace(make_stream(), model="DEADBEEF" + "0" * 56)
    assert read(write(stream), frames_of=frames_of).model == "deadbeef"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model": "xyz"}, "hash"),
        ({"model": "0123abc"}, "hash"),
        ({"samples": -1}, "samples"),
        ({"samples": MAX_SAMPLES + 1}, "samples"),
        ({"gain_db": GAIN_RANGE_DB[0] - 0.5}, "gain_db"),
        ({"gain_db": GAIN_RANGE_DB[1] + 0.5}, "gain_db"),
        ({"gain_db": math.nan}, "gain_db"),
        ({"size": 300}, "power of two"),
        ({"size": 16}, r"outside \[0, 16\)"),
        ({"channels": 2}, "shape"),
        ({"books": 6}, "shape"),
        ({"channels": 9, "codes": np.zeros((9, 6, 12), int)}, "channels"),
        ({"channels": 0, "codes": np.zeros((0, 6, 12), int)}, "channels"),
        ({"books": 256, "codes": np.zeros((1, 6, 256), int)}, "books"),
    ],
)
def test_writing_refuses_what_the_file_cannot_hold(change, word):
    with pytest.raises(ValueError, match=word):
        write(replace(make_stream(), **change))


def refused(data: bytes) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is returned, to be looked at
        read(data, frames_of=frames_of)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("channels", [1, 2])
def test_every_single_byte_error_is_refused(channels):
    data = write(make_stream(samples=96_000, channels=channels))
    for position in range(len(data)):
        for flip in range(1, 256):
            damaged = bytearray(data)
            damaged[position] ^= flip
            refused(bytes(damaged))


def test_every_truncation_is_refused():
    data = write(make_stream(channels=2))
    for length in range(len(data)):
        assert "cut short" in refused(data[:length])


@pytest.mark.parametrize("tail", [b"\0", b"SPR", bytes(1000)])
def test_bytes_after_the_end_are_refused(tail):
    assert "follows its end" in refused(write(make_stream()) + tail)


def test_a_file_written_twice_over_is_refused():
    assert "follows its end" in refused(write(make_stream()) * 2)


def test_other_versions_and_foreign_files_are_told_apart():
    data = write(make_stream())
    assert "version 2" in refused(data[:3] + b"\x02" + data[4:])
    assert "not an .spr file" in refused(b"RIFF" + data[4:])
    assert "not an .spr file" in refused(b"fLaC\0\0\0\x22" + bytes(100))


def test_random_bytes_behind_a_true_beginning_are_refused():
    random = np.random.default_rng(0)
    for length in range(200):
        refused(b"SPR\x01" + random.bytes(length))


def test_an_absurd_length_is_refused_before_anything_is_allocated():
    beginning = b"SPR\x01" + bytes(4)
    hours = b"\xff\xff\xff\xff\x7f" + bytes([255, 0xFF, 0])  # 2³⁵ - 1 samples, 8 channels, 255 books of 31 bits
    assert "tells of" in refused(beginning + hours + bytes(20))
    assert "beyond all bounds" in refused(beginning + b"\xff" * 50)


@pytest.mark.parametrize(("books", "layout"), [(0, 8), (12, 0)])
def test_a_header_without_codes_is_refused(books, layout):
    body = b"SPR\x01" + bytes(4) + b"\0" + bytes([books, layout, 0])
    assert "no codes" in refused(body + zlib.crc32(body).to_bytes(4, "big"))


def test_frames_are_what_the_codec_says():
    data = write(make_stream())
    with pytest.raises(ValueError, match="tells of"):
        read(data, frames_of=lambda samples: frames_of(samples) + 1)
