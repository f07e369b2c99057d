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


def rows_in(audio: torch.Tensor, *, layout: str = "auto", ae_channels: int = 1, block: int = 7_000) -> Rows:
    return Rows(iter(audio.split(block, dim=1)), layout=layout, ae_channels=ae_channels)


def back(rows: Rows, audio: torch.Tensor) -> torch.Tensor:
    """What decoding makes of rows that nothing was lost of."""
    assert (rows.channels, rows.samples) == audio.shape
    header = Header("", rows.samples, 48_000, rows.channels, rows.layout, 1, 2, rows.gains_db)
    decoded = torch.cat([rows.level(audio, row) for row in range(rows_of(rows.layout, rows.channels))])
    return channels_of(decoded, header)


def mixed(left: float, right: float) -> torch.Tensor:
    """One sound panned to the left, with a little of another on both sides."""
    source, room = sound(0.1, 0.003)
    return torch.stack([left * source + room, right * source - room])


@pytest.mark.parametrize(
    ("audio", "wanted", "layout"),
    [
        (sound(0.1), "auto", "separate"),
        (sound(0.1, 0.09), "auto", "mid_side"),
        (mixed(1.0, 0.6), "auto", "mid_side"),
        (sound(0.1, 0.03), "auto", "mid_side"),
        (sound(0.1, 0.01), "auto", "separate"),
        (sound(0.1, 0.0), "auto", "separate"),
        (sound(0.1, 0.03), "mid_side", "mid_side"),
        (sound(0.1, 0.001), "separate", "separate"),
        (sound(0.1).expand(2, -1), "auto", "mid"),
        (sound(0.1, 0.2, 0.3), "auto", "separate"),
    ],
)
def test_channels_come_back_from_their_rows(audio, wanted, layout):
    rows = rows_in(audio, layout=wanted)
    assert rows.layout == layout
    torch.testing.assert_close(back(rows, audio), audio)


def test_an_autoencoder_of_two_channels_takes_them_together():
    stereo, mono = sound(0.1, 0.05), sound(0.1)
    rows = rows_in(stereo, ae_channels=2)
    assert rows.level(stereo[:, 10:20], 0).shape == (1, 2, 10)
    assert rows.layout == "joint"
    torch.testing.assert_close(back(rows, stereo), stereo)
    torch.testing.assert_close(back(rows_in(mono, ae_channels=2), mono), mono)
    twice = mono.expand(2, -1)
    assert rows_in(twice, ae_channels=2).layout == "mid"  # so that both channels come back equal
    torch.testing.assert_close(back(rows_in(twice, ae_channels=2), twice), twice)


@pytest.mark.parametrize(
    ("levels", "wanted", "layout"),
    [
        ((0.1, 0.05), "separate", "separate"),
        ((0.1, 0.05), "mid_side", "mid_side"),
        ((0.1,), "separate", "separate"),
        ((0.1, 0.0), "auto", "joint"),
        ((0.1, 0.2, 0.3), "auto", "separate"),
        ((0.1,) * 8, "auto", "separate"),
    ],
)
def test_an_autoencoder_of_two_channels_takes_single_ones_as_both(levels, wanted, layout):
    audio = sound(*levels)
    rows = rows_in(audio, layout=wanted, ae_channels=2)
    assert rows.layout == layout
    assert rows.level(audio, 0).shape == (1, 2, 30_000)
    torch.testing.assert_close(back(rows, audio), audio)


def test_a_header_with_more_channels_than_the_autoencoder_has_is_refused():
    header = Header("", 100, 48_000, 3, "joint", 1, 2, (0.0,))
    with pytest.raises(ValueError, match=r"claims 3 channels in one row .* has 2"):
        channels_of(torch.ones(1, 2, 100), header)


def test_every_row_is_levelled_by_itself():
    """A side 30 dB below the mid is coded at the same level."""
    middle, side = sound(0.1, 0.1 * 10**-1.5)
    audio = torch.stack([middle + side, middle - side])
    rows = rows_in(audio)
    levels = [rows.level(audio, row).square().mean().log10() * 10 for row in range(2)]
    assert levels == pytest.approx([-23, -23], abs=0.3)
    assert rows.gains_db[1] - rows.gains_db[0] == pytest.approx(30, abs=0.5)


def test_the_gain_is_that_of_the_training(monkeypatch):
    audio = sound(0.02, samples=5_000)
    monkeypatch.setattr("models.channels.SAMPLES_PER_BLOCK", 999)
    assert rows_in(audio, block=1_234).gains_db == (level(audio)[1],)


def test_silence_has_the_largest_gain_of_the_file():
    rows = rows_in(torch.zeros(1, 100))
    assert rows.gains_db == (GAIN_RANGE_DB[1],)
    loud = torch.ones(1, 1, 100)
    header = Header("", 100, 48_000, 1, "separate", 1, 2, rows.gains_db)
    assert channels_of(loud, header).max() < 1e-3
    assert channels_of(loud, dataclasses.replace(header, gains_db=(0.0,))).max() == 1


@pytest.mark.parametrize(("layout", "channels"), [("mid_side", 1), ("mid_side", 3), ("dance", 2)])
def test_layouts_that_cannot_be(layout, channels):
    with pytest.raises(ValueError, match="channels"):
        rows_in(sound(*[0.1] * channels), layout=layout)
