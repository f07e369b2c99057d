"""Sounds whose headers are wrong, missing or odd: all of a sound is read, or what is missing is named."""

from __future__ import annotations

import errno
import io
import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from trainer.data import sound_reader
from trainer.data.sound_reader import SoundReader, duration

RATE = 48_000
NOISE = np.random.default_rng(0).normal(size=(57_600, 1)).clip(-3, 3).astype(np.float32) / 10


def read(path: Path) -> tuple[np.ndarray, list[str]]:
    """The samples (samples, channels), and the notes."""
    with SoundReader(path) as reader:
        return np.concatenate(list(reader.blocks())), reader.notes


def encoded(audio: np.ndarray = NOISE, **options: object) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, audio, RATE, **options)
    return content.getvalue()


def wav(samples: int, declared: int, *, after: bytes = b"", riff: int = 0) -> bytes:
    """16-bit mono of `samples` ones, whose data chunk declares a number of bytes."""
    form = struct.pack("<IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", riff)
        + b"WAVEfmt "
        + form
        + b"data"
        + struct.pack("<I", declared)
        + (struct.pack("<h", 1) * samples + after)
    )


@pytest.fixture
def sound(tmp_path):
    """Write a file of these bytes, and return its path."""

    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def flac(total: int, *, md5: bool = True) -> bytes:
    """FLAC of `NOISE`, whose header promises `total` samples, with or without a checksum."""
    content = bytearray(encoded(format="FLAC"))
    (packed,) = struct.unpack(">Q", content[18:26])
    content[18:26] = struct.pack(">Q", packed >> 36 << 36 | total)
    content[26:42] = content[26:42] if md5 else bytes(16)
    return bytes(content)


@pytest.mark.parametrize(("total", "md5", "note"), [
    (0, False, ""), (0, True, ""), (57_600, True, ""), (57_600, False, ""),
    (2**36 - 1, True, "promises 68719476735 samples, but has 57600"), (20_000, True, "promises 20000 samples"),
])  # fmt: skip
def test_flac_is_read_to_its_end_whatever_it_promises(sound, total, md5, note):
    samples, notes = read(sound("a.flac", flac(total, md5=md5)))
    np.testing.assert_array_equal(
        samples, soundfile.read(io.BytesIO(encoded(format="FLAC")), dtype="float32", always_2d=True)[0]
    )
    assert [text for text in notes if note in text] == notes
    assert bool(notes) == bool(note)


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_the_checksum_of_flac_holds_for_any_depth_and_damage_is_found(sound, subtype, channels):
    content = encoded(np.repeat(NOISE, channels, axis=1), format="FLAC", subtype=subtype)
    samples, notes = read(sound("a.flac", content))
    assert samples.shape == (57_600, channels)
    assert notes == []
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 0x10
    with pytest.raises(ValueError, match=r"a\.flac is (truncated or )?damaged"):
        read(sound("a.flac", bytes(damaged)))


def test_flac_without_a_checksum_that_ends_early_is_refused(sound):
    for content in (flac(2**36 - 1, md5=False), flac(57_600, md5=False)[:40_000]):
        with pytest.raises(ValueError, match=r"a\.flac is truncated or damaged: only \d\.\d\d s of it can be read"):
            read(sound("a.flac", content))


@pytest.mark.parametrize(("name", "options", "length"), [
    ("a.ogg", {"format": "OGG", "subtype": "VORBIS"}, 57_600), ("a.opus", {"format": "OGG", "subtype": "OPUS"}, 57_600),
    ("a.mp3", {"format": "MP3"}, 57_600), ("a.flac", {"format": "FLAC"}, 57_600),
])  # fmt: skip
def test_joined_streams_are_read_to_the_end_of_the_last(sound, name, options, length):
    content = encoded(**options)
    samples, _ = read(sound(name, content + content))
    assert 2 * length <= len(samples) < 2 * length + 3_000  # MP3's second header is decoded as a frame of silence
    np.testing.assert_allclose(samples[:length], soundfile.read(io.BytesIO(content), always_2d=True)[0], atol=1e-5)
    np.testing.assert_allclose(samples[-20_000:-5_000].std(), NOISE.std(), rtol=0.2)


def test_streams_that_change_their_rate_are_refused_with_the_place(sound):
    other = io.BytesIO()
    soundfile.write(other, NOISE, 44_100, format="OGG", subtype="VORBIS")
    with pytest.raises(ValueError, match=r"changes from 48000 Hz and 1 channel\(s\) to 44100 Hz and 1 "):
        read(sound("a.ogg", encoded(format="OGG", subtype="VORBIS") + other.getvalue()))


def test_vbr_mp3_without_its_header_is_read_to_its_end(sound):
    audio = np.concatenate([NOISE * 0.01] * 2 + [NOISE] * 2)
    content = encoded(audio, format="MP3", bitrate_mode="VARIABLE", compression_level=0.3)
    first = 144_000 * [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320][content[2] >> 4] // RATE
    samples, _ = read(sound("a.mp3", content[first + (content[2] >> 1 & 1) :]))
    assert len(samples) == pytest.approx(len(audio), abs=3_000)
    np.testing.assert_allclose(samples[-60_000:].std(), NOISE.std(), rtol=0.2)


@pytest.mark.parametrize("tag", [b"", b"ID3\x04\0\0\0\0\x01\x00" + bytes(128)])
def test_mp3_that_is_cut_is_refused_by_the_frames_in_its_header(sound, tag):
    content = encoded(format="MP3")
    assert len(read(sound("a.mp3", tag + content))[0]) == 57_600
    with pytest.raises(ValueError, match="is truncated or damaged: only"):
        read(sound("a.mp3", tag + content[: len(content) // 2]))


def without_end_mark(content: bytes) -> bytes:
    """Ogg whose last page lacks the end-of-stream flag, with its checksum."""
    begin = content.rfind(b"OggS")
    page = bytearray(content[begin:])
    page[5] &= ~4
    page[22:26] = bytes(4)
    checksum = 0
    for octet in page:
        checksum ^= octet << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C11DB7 if checksum & 0x80000000 else 0)) & 0xFFFFFFFF
    page[22:26] = struct.pack("<I", checksum)
    return content[:begin] + bytes(page)


def test_ogg_without_its_end_mark_is_read_and_noted(sound):
    samples, notes = read(sound("a.ogg", without_end_mark(encoded(format="OGG", subtype="VORBIS"))))
    assert len(samples) == 57_600
    assert [note[:27] for note in notes] == ["has no mark at its end: it "]


def test_damage_inside_ogg_is_noticed(sound):
    content = bytearray(encoded(format="OGG", subtype="VORBIS"))
    content[len(content) // 2] ^= 0x55
    with pytest.raises(ValueError, match=r"a\.ogg is damaged: Skipped \d+ bytes"):
        read(sound("a.ogg", bytes(content)))


@pytest.mark.parametrize(("declared", "after", "samples", "note"), [
    (2_000, b"", 1_000, ""),
    (2_000, b"LIST\4\0\0\0INFO", 1_000, ""),
    (2_000, b"TAG and so on", 1_000, ""),
    (2_000, bytes(999), 1_000, ""),
    (0, b"", 1_000, "has no length in its header: it is read to the end of the file"),
    (0xFFFFFFFF, b"", 1_000, ""),
    (1_000, b"", 500, "goes on after the end that its header says: the last 1000 bytes are left out"),
    (2_000, b"\x80 is no chunk", 1_000, "goes on after the end that its header says: the last 13 bytes are left out"),
])  # fmt: skip
def test_lengths_of_wav(sound, declared, after, samples, note):
    found, notes = read(sound("a.wav", wav(1_000, declared, after=after)))
    assert found.shape == (samples, 1)
    assert np.all(found == 2.0**-15)
    assert notes == ([note] if note else [])


def test_a_length_that_wrapped_at_4_gib_is_unwrapped(sound, monkeypatch):
    monkeypatch.setattr("trainer.data.sound_headers._WRAP", 1 << 16)
    length = (1 << 16) + 4_000
    for after in (b"", b"LIST\4\0\0\0INFO"):
        found, notes = read(sound("a.wav", wav(length // 2, 4_000, after=after)))
        assert found.shape == (length // 2, 1)
        assert np.all(found == 2.0**-15)
        assert notes == ["has a length that wrapped at 4 GiB: it is read to its end"]


def test_a_wav_of_more_than_4_gib_is_read_to_its_end(sound, tmp_path):
    """A file with a hole, so that it takes no room; only its end is looked at."""
    path = sound("a.wav", wav(0, 50_000))
    os.truncate(path, 44 + (1 << 32) + 50_000)
    with SoundReader(path) as reader:
        assert reader.estimate() == pytest.approx(((1 << 32) + 50_000) / 2 / RATE, rel=1e-3)
        assert reader.notes == ["has a length that wrapped at 4 GiB: it is read to its end"]


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize(("form", "order"), [("WAV", "LITTLE"), ("WAV", "BIG"), ("WAVEX", "LITTLE")])
def test_samples_of_any_kind_are_read_without_a_length(sound, subtype, form, order):
    content = bytearray(encoded(np.repeat(NOISE, 2, axis=1), format=form, subtype=subtype, endian=order))
    expected, _ = read(sound("a.wav", bytes(content)))
    place = content.index(b"data")
    content[place + 4 : place + 8] = bytes(4)
    found, notes = read(sound("b.wav", bytes(content)))
    np.testing.assert_array_equal(found, expected)
    assert notes == ["has no length in its header: it is read to the end of the file"]


@pytest.mark.parametrize("form", ["WAV", "AIFF", "AU", "CAF", "W64", "RF64"])
def test_uncompressed_sound_is_read_whole_or_refused(sound, form):
    content = encoded(np.repeat(NOISE, 2, axis=1), format=form, subtype="PCM_24")
    samples, notes = read(sound("a.x", content))
    np.testing.assert_allclose(samples, np.repeat(NOISE, 2, axis=1), atol=2**-23)
    assert notes == []
    for kept in (len(content) // 2, len(content) - 2_000):
        with pytest.raises(ValueError, match=r"a\.x is truncated"):
            read(sound("a.x", content[:kept]))


@pytest.mark.parametrize("subtype", ["GSM610", "IMA_ADPCM", "MS_ADPCM", "ULAW", "ALAW"])
def test_sound_of_telephones_is_read(sound, subtype):
    content = io.BytesIO()
    soundfile.write(content, NOISE, 8_000, format="WAV", subtype=subtype)
    samples, notes = read(sound("a.wav", content.getvalue()))
    assert len(samples) == pytest.approx(len(NOISE), abs=2_048)  # these are coded in blocks
    assert notes == []


@pytest.mark.parametrize(("name", "codec"), [
    ("a.m4a", "aac"), ("a.aac", "aac"), ("a.webm", "libopus"), ("a.mka", "aac"), ("a.wma", "wmav2"), ("a.m4a", "alac"),
])  # fmt: skip
def test_what_libsndfile_does_not_know_is_read(tmp_path, name, codec):
    path = tmp_path / name
    with av.open(path, "w", format="adts" if name == "a.aac" else None) as file:
        stream = file.add_stream(codec, rate=RATE, layout="stereo", options={"b": "192k"})
        stereo = np.ascontiguousarray(np.repeat(NOISE, 2, axis=1).T)
        frame = av.AudioFrame.from_ndarray(stereo, format="fltp", layout="stereo")
        frame.rate = RATE
        resampler = av.AudioResampler(
            stream.codec_context.format, "stereo", RATE, stream.codec_context.frame_size or None
        )
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    samples, notes = read(path)
    assert samples.shape == (pytest.approx(len(NOISE), abs=4_096), 2)
    assert samples[10_000:50_000].std() == pytest.approx(NOISE.std(), rel=0.2)
    assert notes == []
    assert duration(path) == pytest.approx(1.2, abs=0.1)
    if name not in ("a.aac", "a.m4a"):  # the first promises no length, and the second ends with its table
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"is truncated|can't be read"):
            read(path)


def test_a_playlist_is_not_followed(sound, tmp_path):
    sound("secret.wav", wav(1_000, 2_000))
    for content in (b"#EXTM3U\n#EXTINF:1,\nsecret.wav\n#EXT-X-ENDLIST\n", b"ffconcat version 1.0\nfile secret.wav\n"):
        with pytest.raises(ValueError, match=r"list\.wav can't be read as sound"):
            read(sound("list.wav", content))


@pytest.mark.parametrize(("largest", "divisor"), [(32_767, 32_768), (163_840, 32_768), (2.0**31, 2**31)])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floats_in_the_range_of_whole_numbers_are_divided_and_noted(sound, largest, divisor, subtype):
    audio = NOISE / np.abs(NOISE).max()
    samples, notes = read(sound("a.wav", encoded(audio * largest, format="WAV", subtype=subtype)))
    np.testing.assert_allclose(samples, audio * largest / divisor, rtol=1e-6)
    assert notes == [f"has values up to {largest:.6g} in place of 1: they are divided by {divisor}"]
    content = bytearray(encoded(audio * largest, format="WAV", subtype=subtype))
    place = content.index(b"data")
    content[place + 4 : place + 8] = bytes(4)
    with pytest.raises(ValueError, match=rf"b\.wav has values up to .*is 1: divide the values by {divisor}"):
        read(sound("b.wav", bytes(content)))


def test_loud_floats_are_left_as_they_are(sound):
    samples, notes = read(sound("b.wav", encoded(NOISE * 100, format="WAV", subtype="FLOAT")))
    np.testing.assert_array_equal(samples, NOISE * 100)
    assert notes == []


def test_it_is_said_what_a_file_is_that_is_none(tmp_path):
    (tmp_path / "broken.wav").symlink_to("nowhere.wav")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    for name, reason in (
        ("missing.wav", "is missing"),
        ("broken.wav", "is a link to nowhere.wav, which is missing"),
        ("loop.wav", "is a link that leads back to itself"),
        ("folder.wav", "is a folder, not a file"),
        ("pipe.wav", "is a pipe, not a file"),
    ):
        with pytest.raises(ValueError, match=f"{name} {reason}"):
            SoundReader(tmp_path / name)
        assert duration(tmp_path / name) == 0
    with pytest.raises(ValueError, match="is a device, not a file"):
        SoundReader(Path("/dev/zero"))


def test_names_that_are_not_utf8_are_read(tmp_path):
    path = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.wav"))
    path.write_bytes(wav(1_000, 2_000))
    assert len(read(path)[0]) == 1_000
    path.write_bytes(encoded(format="MP3"))
    assert len(read(path)[0]) == 57_600


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3"])
@pytest.mark.parametrize("good_reads", [0, 1, 3])
def test_an_error_of_the_disk_is_not_the_end_of_the_sound(sound, monkeypatch, name, good_reads):
    path = sound(name, encoded(np.tile(NOISE, (30, 1)), format={"a.mp3": "MP3", "a.flac": "FLAC"}.get(name, "WAV")))
    left, readv = [good_reads], os.readv

    def failing(descriptor: int, buffers: list[memoryview]) -> int:
        if not left[0]:
            raise OSError(errno.EIO, "Input/output error")
        left[0] -= 1
        return readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", failing)
    with pytest.raises(OSError, match=f"Input/output error.*{name}"):
        read(path)
    left[0] = good_reads
    if not good_reads:
        with pytest.raises(OSError, match="Input/output error"):
            duration(path)


def test_refused_access_is_the_disks_fault_where_permissions_grant_it(sound, monkeypatch):
    path = sound("a.wav", wav(1_000, 2_000))

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        SoundReader(path)
    path.chmod(0)
    with pytest.raises(ValueError, match="can't be opened: permission denied"):
        SoundReader(path)


def test_blocks_are_bounded(sound):
    with SoundReader(sound("a.mp3", encoded(np.tile(NOISE, (5, 1)), format="MP3"))) as reader:
        assert max(len(block) for block in reader.blocks()) <= sound_reader._BLOCK


def test_planning_knows_about_how_long_a_sound_is(sound):
    assert duration(sound("a.flac", flac(57_600))) == 1.2
    assert 0.1 < duration(sound("a.flac", flac(0, md5=False))) < 10
    assert duration(sound("a.wav", wav(48_000, 0))) == pytest.approx(1, abs=0.1)
    assert duration(sound("a.wav", b"nothing")) == 0
