"""One sound with an absurd header never stops `prepare`: it is read within bounds, or named and left out."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from models.resampling import resample
from tests.damage import watched
from trainer.data import sound_reader
from trainer.data.clips import ClipEncoder
from trainer.data.sound_reader import HIGHEST_RATE, LOWEST_RATE, SoundReader
from trainer.data.sources import SoundFile

RATE = 48_000
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 24_000).astype(np.float32)


class Copies:
    """An AudioAE of one channel whose latents are its audio."""

    sample_rate, hop, channels, latent_channels = RATE, 480, 1, 480

    def encode(self, audio_BCS):
        return audio_BCS.unflatten(2, (-1, 480))[:, 0].transpose(1, 2)


def wav(rate: int, *, channels: int = 1, samples: int = 24_000) -> bytes:
    data = (NOISE[:samples] * 32767).astype("<i2").tobytes()
    about = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * 2 & 0xFFFFFFFF, 2 * channels & 0xFFFF, 16)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(data))
        + b"WAVEfmt "
        + about
        + b"data"
        + struct.pack("<I", len(data))
        + data
    )


def flac(**promised: int) -> bytes:
    """Return a FLAC whose header promises other numbers: `rate` (20 bits), `samples` (36 bits)."""
    file = io.BytesIO()
    soundfile.write(file, NOISE, RATE, format="FLAC")
    content = bytearray(file.getvalue())
    fields = int.from_bytes(content[18:26])
    samples, rate = promised.get("samples", fields & (1 << 36) - 1), promised.get("rate", fields >> 44)
    kept = fields >> 36 & 0xFF
    content[18:26] = (rate << 44 | kept << 36 | samples).to_bytes(8)
    return bytes(content)


def seconds_of(path: Path) -> float:
    """Read a sound as `prepare` does, resampled; return its length."""
    with watched(), SoundReader(path) as reader:
        blocks = (block.T[:1] for block in reader.blocks())
        return sum(block.shape[1] for block in resample(blocks, reader.rate, RATE, channels=1)) / RATE


@pytest.mark.parametrize("rate", [1, 2, LOWEST_RATE - 1, HIGHEST_RATE + 1, 2**31 - 1])
def test_a_rate_that_no_sound_has_is_refused(tmp_path, rate):
    (tmp_path / "a.wav").write_bytes(wav(rate))
    with pytest.raises(ValueError, match=rf"a.wav has a sample rate of {rate:,} Hz, and is no sound: 100 Hz to 10 MHz"):
        seconds_of(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [LOWEST_RATE, 400, 8000, 48_000, 768_000, HIGHEST_RATE])
def test_other_rates_are_read_in_bounded_blocks(tmp_path, rate):
    (tmp_path / "a.wav").write_bytes(wav(rate))
    assert seconds_of(tmp_path / "a.wav") == pytest.approx(24_000 / rate, abs=0.01)


def test_a_resampled_block_is_bounded_and_the_bits_stay():
    small = list(resample(iter(NOISE[None, :2000].reshape(20, 1, 100)), LOWEST_RATE, RATE, channels=1))
    large = list(resample(iter([NOISE[None, :2000]]), LOWEST_RATE, RATE, channels=1))
    np.testing.assert_array_equal(np.concatenate(small, 1), np.concatenate(large, 1))
    assert max(block.shape[1] for block in resample([np.repeat(NOISE, 3)[None]], 100, RATE, channels=1)) < 3 << 20


@pytest.mark.parametrize("content", [flac(samples=2**36 - 1), flac(rate=1)])
def test_a_flac_is_read_to_its_end_whatever_its_header_says(tmp_path, content):
    (tmp_path / "a.flac").write_bytes(content)
    assert seconds_of(tmp_path / "a.flac") == 0.5


def test_thousands_of_channels_are_refused(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(RATE, channels=65_535))
    with pytest.raises(ValueError, match=r"a\.wav"):
        seconds_of(tmp_path / "a.wav")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("the decoder gave up")])
def test_a_decoder_that_gives_up_leaves_out_one_file(tmp_path, monkeypatch, error):
    soundfile.write(tmp_path / "a.wav", NOISE, RATE)

    def gives_up(decoder, notes):
        yield NOISE[:, None]
        raise error

    monkeypatch.setattr(sound_reader.Libsndfile, "blocks", gives_up)
    encoded = ClipEncoder(Copies(), 4800)(SoundFile(tmp_path / "a.wav", "a.wav", "a", ""), False)
    assert not len(encoded.clips)
    assert len(encoded.problems) == 1
    assert "can't be decoded: " in encoded.problems[0]


def with_a_random_header(chance: random.Random) -> bytes:
    number = chance.choice((0, 1, 99, 100, 12_345, 2**15, 2**19, 2**20 - 1))
    if chance.random() < 0.5:
        return flac(rate=number, samples=chance.choice((0, 1, 2**35, 2**36 - 1, 24_000)))
    return wav(chance.choice((number, number << 11)) & 0xFFFFFFFF, channels=chance.choice((1, 2, 0, 255)))


def outcome(path: Path) -> str:
    """Return why a sound is refused; empty if it is read."""
    try:
        assert 0 <= seconds_of(path) < 1000
    except ValueError as error:
        return str(error)
    return ""


def test_headers_at_random_end_in_a_sound_or_a_line(tmp_path):
    path, lines = tmp_path / "a.sound", []
    for seed in range(60):
        path.write_bytes(with_a_random_header(random.Random(seed)))
        lines.append(outcome(path))
    refused = [line for line in lines if line]
    assert 15 < len(refused) < 60
    assert [line for line in refused if not line.startswith(str(path)) or not line.isprintable()] == []
