from __future__ import annotations

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.bitstream import (
    GAIN_RANGE_DB,
    MAX_SAMPLES,
    MOST_COMPRESSION,
    RATES,
    Header,
    Stream,
    model_of,
    pack,
    read,
    read_header,
    unpack,
    write,
)
from models.prior import Coder, Prior


def frames_of(samples: int, rate: int) -> int:
    return math.ceil(samples / rate) + 1


def make_stream(
    *, samples: int = 240_000, channels: int = 1, books: int = 12, size: int = 256, rate: int = 48_000, **fields
) -> Stream:
    layout = fields.pop("layout", "separate")
    rows = {"separate": channels, "mid_side": 2, "mid": 1, "joint": 1}[layout]
    codes = np.random.default_rng(0).integers(0, size, (rows, frames_of(samples, rate), books))
    header = Header("0123abcd", samples, rate, channels, layout, books, size, gains_db=(-7.5, 3.0) * 4)
    return Stream(replace(header, gains_db=header.gains_db[:rows], **fields), codes)


def likely_coder(books: int = 12, size: int = 256, *, seed: int = 0, sure: float = 8.0) -> Coder:
    """A prior that expects low codes, the more so the surer."""
    torch.manual_seed(seed)
    prior = Prior(books, size)
    with torch.no_grad():
        prior.bias.copy_(-sure * torch.arange(size) / size)
    return prior.coder()


def likely_stream(**fields) -> Stream:
    stream = make_stream(**fields)
    return replace(stream, codes=stream.codes // 64)


def with_header(stream: Stream, **changes) -> Stream:
    codes = changes.pop("codes", stream.codes)
    return Stream(replace(stream.header, **changes), codes)


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
    assert back.header == stream.header
    assert write(back) == data


@pytest.mark.parametrize("rate", [*RATES, 100, 44_056, 768_000])
@pytest.mark.parametrize(("layout", "channels"), [("separate", 3), ("mid_side", 2), ("mid", 2), ("joint", 2)])
def test_rate_and_channels_come_back(rate, layout, channels):
    stream = make_stream(samples=3 * rate, rate=rate, layout=layout, channels=channels)
    assert read(write(stream), frames_of=frames_of).header == stream.header


def test_the_payload_is_exact_and_the_rest_small():
    five_seconds = make_stream()  # 1 Hz · 12 books · 8 bits = 96 bits/s, with the frame at the end 6 vectors
    assert len(write(five_seconds)) == 6 * 12 + 19
    assert five_seconds.header.packed_bits(6) == 6 * 96


@pytest.mark.parametrize(("gain", "stored"), [(0, 0), (0.3, 0.5), (-0.2, 0), (-64, -64), (63.5, 63.5), (-12.8, -13)])
def test_gain_is_kept_to_half_a_decibel(gain, stored):
    stream = with_header(make_stream(), gains_db=(gain,))
    assert read(write(stream), frames_of=frames_of).header.gains_db == (stored,)


def test_a_longer_hash_is_stored_by_its_beginning():
    data = write(with_header(make_stream(), model="DEADBEEF" + "0" * 56))
    assert read(data, frames_of=frames_of).header.model == model_of(data) == "deadbeef"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model": "xyz"}, "hash"),
        ({"model": "0123abc"}, "hash"),
        ({"samples": -1}, "samples"),
        ({"samples": MAX_SAMPLES + 1}, "samples"),
        ({"rate": 99}, "rate"),
        ({"rate": 768_001}, "rate"),
        ({"gains_db": (GAIN_RANGE_DB[0] - 0.5,)}, "gain_db"),
        ({"gains_db": (GAIN_RANGE_DB[1] + 0.5,)}, "gain_db"),
        ({"gains_db": (math.nan,)}, "gain_db"),
        ({"gains_db": (0, 0)}, "2 gains"),
        ({"layout": "mid"}, "do not fit the layout mid"),
        ({"size": 300}, "power of two"),
        ({"size": 16}, r"outside \[0, 16\)"),
        ({"channels": 2}, "shape"),
        ({"books": 6}, "shape"),
        ({"channels": 9, "gains_db": (0,) * 9, "codes": np.zeros((9, 6, 12), int)}, "channels"),
        ({"channels": 0, "gains_db": (), "codes": np.zeros((0, 6, 12), int)}, "channels"),
        ({"books": 256, "codes": np.zeros((1, 6, 256), int)}, "books"),
    ],
)
def test_writing_refuses_what_the_file_cannot_hold(change, word):
    with pytest.raises(ValueError, match=word):
        write(with_header(make_stream(), **change))


# --- entropy coding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "channels"), [("separate", 1), ("mid_side", 2)])
def test_what_is_likely_takes_fewer_bytes_and_comes_back(layout, channels):
    stream, coder = likely_stream(layout=layout, channels=channels), likely_coder()
    data, plain = write(stream, coder=coder), write(stream)
    assert len(data) < 0.95 * len(plain)
    back = read(data, frames_of=frames_of, coder=coder)
    assert np.array_equal(back.codes, stream.codes)
    assert back.header == replace(stream.header, prior=coder.hash.hex())
    header, payload = read_header(data)
    assert header == back.header
    assert payload == len(coder.encode(stream.codes))


@pytest.mark.parametrize("coder", [None, likely_coder()])
@pytest.mark.parametrize(
    ("layout", "channels", "version"), [("separate", 1, 2), ("mid_side", 2, 3), ("separate", 3, 3)]
)
def test_interleaved_rows_come_back(layout, channels, version, coder):
    stream = with_header(likely_stream(layout=layout, channels=channels), interleaved=True)
    data = write(stream, coder=coder)
    assert data[3] == version
    back = read(data, frames_of=frames_of, coder=coder)
    assert np.array_equal(back.codes, stream.codes)
    assert back.header.in_order
    assert back.header.interleaved == (channels > 1)
    assert bool(back.header.prior) == (coder is not None)


def test_interleaved_rows_follow_one_another_in_the_order_of_time():
    stream = with_header(make_stream(channels=2), interleaved=True)
    end = stream.codes.copy()
    end[:, -1] ^= 1
    data, other = write(stream), write(with_header(stream, codes=end))
    assert data[: -4 - 2 * 12] == other[: -4 - 2 * 12]
    assert not with_header(stream, interleaved=False).header.in_order


def test_what_entropy_coding_would_lengthen_is_packed():
    stream = make_stream()
    unlikely = with_header(stream, codes=255 - stream.codes // 64)
    assert write(unlikely, coder=likely_coder()) == write(unlikely)


def test_fewer_books_are_coded_by_the_same_prior():
    stream, coder = likely_stream(books=5), likely_coder()
    data = write(stream, coder=coder)
    assert read(data, frames_of=frames_of, coder=coder).header.prior
    assert np.array_equal(read(data, frames_of=frames_of, coder=coder).codes, stream.codes)


def test_another_prior_is_refused():
    data = write(likely_stream(), coder=likely_coder())
    with pytest.raises(ValueError, match=r"entropy-coded with prior \w{4}, but this codec has prior \w{4}"):
        read(data, frames_of=frames_of, coder=likely_coder(sure=6))
    with pytest.raises(ValueError, match="but this codec has no prior"):
        read(data, frames_of=frames_of)


def test_a_payload_is_never_shorter_than_a_sixteenth_of_the_packed_one():
    """Or a few bytes would make a reader hold any amount of codes."""
    stream = make_stream(samples=400 * 48_000, books=3, size=16)
    sure, expected = likely_coder(3, 16, sure=500), with_header(stream, codes=np.zeros_like(stream.codes))
    data = write(expected, coder=sure)
    least = -(-stream.header.packed_bits(401) // 8 // MOST_COMPRESSION)
    assert read_header(data)[1] == least > 2 * len(sure.encode(expected.codes))
    assert np.array_equal(read(data, frames_of=frames_of, coder=sure).codes, expected.codes)
    shorter = data[:-5]
    shorter += zlib.crc32(shorter).to_bytes(4, "big")
    with pytest.raises(ValueError, match="cut short"):
        read(shorter, frames_of=frames_of, coder=sure)


def test_bytes_that_no_codes_are_written_as_are_refused():
    coder = likely_coder()
    data = write(likely_stream(), coder=coder)
    for tail in (b"\0", b"\x80", b"spr"):
        longer = data[:-4] + tail
        with pytest.raises(ValueError, match="damaged"):
            read(longer + zlib.crc32(longer).to_bytes(4, "big"), frames_of=frames_of, coder=coder)


# --- what is damaged --------------------------------------------------------------------------------------------------


def refused(data: bytes, coder: Coder | None = None) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is returned, to be looked at
        read(data, frames_of=frames_of, coder=coder)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("coded", [False, True])
def test_every_single_byte_error_is_refused(coded):
    coder = likely_coder(books=3) if coded else None
    data = write(likely_stream(samples=300_000, channels=2, books=3), coder=coder)
    for position in range(len(data)):
        for flip in range(1, 256):
            damaged = bytearray(data)
            damaged[position] ^= flip
            refused(bytes(damaged), coder)


@pytest.mark.parametrize("coder", [None, likely_coder()])
def test_every_truncation_is_refused(coder):
    data = write(likely_stream(channels=2), coder=coder)
    for length in range(len(data)):
        assert "cut short" in (message := refused(data[:length], coder)) or (coder and "checksum" in message)


@pytest.mark.parametrize("tail", [b"\0", b"SPR", bytes(1000)])
def test_bytes_after_the_end_are_refused(tail):
    assert "has bytes after its end" in refused(write(make_stream()) + tail)


def test_a_file_written_twice_over_is_refused():
    assert "has bytes after its end" in refused(write(make_stream()) * 2)


def test_other_versions_and_foreign_files_are_told_apart():
    data = write(make_stream())
    assert "version 1" in refused(data[:3] + b"\x01" + data[4:])
    assert "not an .spr file" in refused(b"RIFF" + data[4:])
    assert "not an .spr file" in refused(b"fLaC\0\0\0\x22" + bytes(100))


def test_random_bytes_behind_a_true_beginning_are_refused():
    random = np.random.default_rng(0)
    for length in range(200):
        refused(b"SPR\x02" + random.bytes(length))


def test_an_absurd_length_is_refused_before_anything_is_allocated():
    beginning = b"SPR\x02" + bytes(4)
    hours = b"\xff\xff\xff\xff\x7f" + bytes([255, 0xFF, 0x80]) + bytes(8)  # 2³⁵ - 1 samples, 8 × 255 books of 31 bits
    assert "its header needs" in refused(beginning + hours + bytes(20))
    assert "is too large" in refused(beginning + b"\xff" * 50)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ((0, 8, 0x80), "no books or no code bits"),
        ((12, 0, 0x80), "no books or no code bits"),
        ((12, 8, 0x88), "contradicts"),
        ((12, 8, 0x82), "contradicts"),
        ((12, 8, 0x84), "contradicts"),
        ((12, 8, 0xF0, 99), "contradicts"),
        ((12, 8, 0xF0, 0xFF, 0xFF, 0x7F), "contradicts"),
    ],
)
def test_a_header_that_cannot_be_is_refused(fields, word):
    body = b"SPR\x02" + bytes(4) + b"\0" + bytes(fields) + bytes(3)
    assert word in refused(body + zlib.crc32(body).to_bytes(4, "big"))


def test_frames_are_what_the_codec_says():
    data = write(make_stream())
    with pytest.raises(ValueError, match="its header needs"):
        read(data, frames_of=lambda samples, rate: frames_of(samples, rate) + 1)
