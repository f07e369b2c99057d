from __future__ import annotations

import dataclasses

import pytest
import torch

from models.bitstream import GAIN_RANGE_DB, Header, rows_of
from models.channels import Rows, channels_of
from models.loudness import level


def sound(*levels: float, samples: int = 30_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(levels), samples, generator=generator) * torch.tensor(levels)[:, None]


def back(rows: Rows) -> torch.Tensor:
    """What decoding makes of rows that nothing was lost of."""
    samples, channels = rows.audio.shape[-1], len(rows.audio)
    header = Header("", samples, 48_000, channels, rows.layout, 1, 2, rows.gains_db)
    decoded = torch.cat([rows.read(row, 0, samples) for row in range(rows_of(rows.layout, channels))])
    return channels_of(decoded, header)


@pytest.mark.parametrize(
    ("audio", "wanted", "layout"),
    [
        (sound(0.1), "auto", "separate"),
        (sound(0.1, 0.03), "auto", "mid_side"),
        (sound(0.1, 0.001), "separate", "separate"),
        (sound(0.1).expand(2, -1), "auto", "mid"),
        (sound(0.1, 0.2, 0.3), "auto", "separate"),
    ],
)
def test_channels_come_back_from_their_rows(audio, wanted, layout):
    rows = Rows(audio, layout=wanted, ae_channels=1)
    assert rows.layout == layout
    torch.testing.assert_close(back(rows), audio)


def test_an_autoencoder_of_two_channels_takes_them_together():
    stereo, mono = sound(0.1, 0.05), sound(0.1)
    rows = Rows(stereo, layout="auto", ae_channels=2)
    assert rows.read(0, 10, 20).shape == (1, 2, 10)
    assert rows.layout == "joint"
    torch.testing.assert_close(back(rows), stereo)
    torch.testing.assert_close(back(Rows(mono, layout="auto", ae_channels=2)), mono)
    with pytest.raises(ValueError, match="2 channels together"):
        Rows(sound(1, 1, 1), layout="auto", ae_channels=2)


def test_every_row_is_levelled_by_itself():
    """A side 30 dB below the mid is coded at the same level."""
    middle, side = sound(0.1, 0.1 * 10**-1.5)
    rows = Rows(torch.stack([middle + side, middle - side]), layout="auto", ae_channels=1)
    levels = [rows.read(row, 0, 30_000).square().mean().log10() * 10 for row in range(2)]
    assert levels == pytest.approx([-23, -23], abs=0.3)
    assert rows.gains_db[1] - rows.gains_db[0] == pytest.approx(30, abs=0.5)


def test_the_gain_is_that_of_the_training(monkeypatch):
    audio = sound(0.02, samples=5_000)
    monkeypatch.setattr("models.channels.SAMPLES_PER_BLOCK", 999)
    assert Rows(audio, layout="auto", ae_channels=1).gains_db == (level(audio)[1],)


def test_silence_has_the_largest_gain_of_the_file():
    rows = Rows(torch.zeros(1, 100), layout="auto", ae_channels=1)
    assert rows.gains_db == (GAIN_RANGE_DB[1],)
    loud = torch.ones(1, 1, 100)
    header = Header("", 100, 48_000, 1, "separate", 1, 2, rows.gains_db)
    assert channels_of(loud, header).max() < 1e-3
    assert channels_of(loud, dataclasses.replace(header, gains_db=(0.0,))).max() == 1


@pytest.mark.parametrize(("layout", "channels"), [("mid_side", 1), ("mid_side", 3), ("dance", 2)])
def test_layouts_that_cannot_be(layout, channels):
    with pytest.raises(ValueError, match="channels"):
        Rows(sound(*[0.1] * channels), layout=layout, ae_channels=1)
