"""Convert the channels of a sound to rows, which are coded independently, and back.

A row is what the AudioAE takes: one channel, or both channels of stereo if the AudioAE is stereo. A mono AudioAE gets
stereo as mid (L + R) / 2 and side (L - R) / 2, because left and right would code most of the sound twice. A stereo
AudioAE gets a single channel as both of its own, and the mean of both is decoded.

The models are trained on levelled sounds, so each row is levelled by itself and its gain is stored: a quiet side is
coded as accurately as the mid and is made quiet again by decoding. A silent row gets the largest gain, which makes any
decoded sound inaudible.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from models.bitstream import GAIN_RANGE_DB, Header, rows_of
from models.loudness import GainMeter

SAMPLES_PER_BLOCK = 2**20
"""Samples per channel that are measured at once."""
_FAR_QUIETER = 0.1  # -10 dB
LAYOUT_CHOICES = ("auto", "separate", "mid_side")
"""The user's choices. For stereo, `auto` is both channels together if the AudioAE is stereo; otherwise mid and side,
unless one channel is 10 dB quieter than the side."""


class Rows:
    """The rows of a sound: how it is divided into rows, and the gain of each.

    Args:
        blocks: the whole sound, in blocks (channels, any length).
        layout: `auto`, `separate` or `mid_side`.
        ae_channels: number of channels of the AudioAE, 1 or 2.

    Attributes:
        layout: one of `models.bitstream.LAYOUTS`.
        gains_db: gain of each row in dB.
        channels: number of channels of the sound.
        samples: number of samples per channel.

    Raises:
        ValueError: the layout does not fit the number of channels.
    """

    def __init__(self, blocks: Iterable[Tensor], *, layout: str, ae_channels: int) -> None:
        self.ae_channels = ae_channels
        self.samples = self.channels = 0
        meters: dict[str, list[GainMeter]] = {}
        for block_CS in _of_equal_length(blocks):
            if not meters:
                self.channels = len(block_CS)
                meters = {each: _meters(each, self.channels) for each in _layouts(self.channels, layout, ae_channels)}
            self.samples += block_CS.shape[1]
            for each, of_rows in meters.items():
                for row, meter in enumerate(of_rows):
                    meter.add(_row(block_CS, each, row))
        self.layout = _choose(meters)
        gains = [meter.gain_db() for meter in meters[self.layout]]
        self.gains_db = tuple(GAIN_RANGE_DB[1] if gain is None else gain for gain in gains)
        self._factors = [1.0 if gain is None else 10 ** (gain / 20) for gain in gains]

    def __len__(self) -> int:
        return len(self.gains_db)

    def level(self, audio_CS: Tensor, row: int) -> Tensor:
        """Return the levelled row of a part of the sound (channels, …): (1, channels of the AudioAE, …)."""
        return (_row(audio_CS, self.layout, row) * self._factors[row]).expand(self.ae_channels, -1)[None]


def _of_equal_length(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the sound in blocks of `SAMPLES_PER_BLOCK`, so that sums don't depend on how it was read."""
    held: list[Tensor] = []
    for block_CS in blocks:
        held.append(block_CS)
        while sum(block.shape[1] for block in held) >= SAMPLES_PER_BLOCK:
            whole_CS = torch.cat(held, dim=1)
            yield whole_CS[:, :SAMPLES_PER_BLOCK]
            held = [whole_CS[:, SAMPLES_PER_BLOCK:]]
    if sum(block.shape[1] for block in held):
        yield torch.cat(held, dim=1)


def _row(audio_CS: Tensor, layout: str, row: int) -> Tensor:
    if layout in ("mid_side", "mid"):
        return ((audio_CS[:1] + audio_CS[1:]) if row == 0 else (audio_CS[:1] - audio_CS[1:])) / 2
    return audio_CS if layout == "joint" else audio_CS[row : row + 1]


def _meters(layout: str, channels: int) -> list[GainMeter]:
    return [GainMeter() for _ in range(rows_of(layout, channels))]


def _choose(meters: dict[str, list[GainMeter]]) -> str:
    """Return the layout to use, of those that were measured.

    What the codec adds to a row is in proportion to that row's level, and mid and side put it into both channels. So a
    channel that is far quieter than the side is coded by itself. A side that is nothing at all is left out.
    """
    if len(meters) == 1:
        return next(iter(meters))
    if meters["mid_side"][1].largest == 0.0:
        return "mid"
    if "joint" in meters:
        return "joint"
    channel, side = (min(meter.power for meter in meters[each]) for each in ("separate", "mid_side"))
    return "separate" if channel < side * _FAR_QUIETER else "mid_side"


def _layouts(channels: int, wanted: str, ae_channels: int) -> tuple[str, ...]:
    """Return the layouts to choose from, the preferred one first."""
    if wanted not in LAYOUT_CHOICES:
        raise ValueError(f"channels={wanted} is unknown: choose one of {', '.join(LAYOUT_CHOICES)}")
    if wanted == "mid_side" and channels != 2:
        raise ValueError(f"channels=mid_side needs a sound of 2 channels, not of {channels}: choose channels=auto")
    if wanted != "auto":
        return (wanted,)
    if ae_channels == 2 and channels <= 2:
        return ("joint",) if channels == 1 else ("joint", "mid", "mid_side")
    return ("mid_side", "mid", "separate") if channels == 2 else ("separate",)


def channels_of(rows_RCS: Tensor, header: Header) -> Tensor:
    """Undo the gains of decoded rows (rows, channels of the AudioAE, samples); return the (channels, samples).

    Raises:
        ValueError: the header claims that one row is more channels than the AudioAE has.
    """
    factors = rows_RCS.new_tensor([10 ** (-gain / 20) for gain in header.gains_db])
    rows_RCS = rows_RCS * factors[:, None, None]
    if header.layout == "joint" and header.channels > 1:
        if header.channels != rows_RCS.shape[1]:
            raise ValueError(
                f"the stream is damaged: its header claims {header.channels} channels in one row of codes, but this "
                f"codec's autoencoder has {rows_RCS.shape[1]}"
            )
        return rows_RCS[0]
    rows_RS = rows_RCS.mean(1)
    if header.layout == "mid_side":
        return torch.stack([rows_RS[0] + rows_RS[1], rows_RS[0] - rows_RS[1]])
    return rows_RS.expand(header.channels, -1) if header.layout == "mid" else rows_RS
