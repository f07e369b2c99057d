"""Convert the channels of a sound to rows, which are coded independently, and back.

A row is what the AudioAE takes: for a mono AudioAE, one channel. Stereo is coded as mid (L + R) / 2 and side
(L - R) / 2, because left and right would code most of the sound twice. The models are trained on levelled sounds, so
each row is levelled by itself and its gain is stored: a quiet side is coded as accurately as the mid and is made quiet
again by decoding. A silent row gets the largest gain, which makes any decoded sound inaudible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.bitstream import GAIN_RANGE_DB, Header, rows_of
from models.loudness import gain_of

SAMPLES_PER_BLOCK = 2**20
"""Samples per channel that are read at once to measure the level."""
LAYOUT_CHOICES = ("auto", "separate", "mid_side")
"""The user's choices; `auto` is mid/side for stereo."""


class Rows:
    """The rows of a sound, computed when they are read.

    Args:
        audio: (channels, samples).
        layout: `auto`, `separate` or `mid_side`.
        ae_channels: number of channels of the AudioAE.

    Attributes:
        layout: one of `models.bitstream.LAYOUTS`.
        gains_db: gain of each row in dB.

    Raises:
        ValueError: the layout does not fit the number of channels.
    """

    def __init__(self, audio: Tensor, *, layout: str, ae_channels: int) -> None:
        self.audio, self.ae_channels = audio, ae_channels
        self.layout = _choose_layout(audio, layout, ae_channels)
        self.gains_db: tuple[float, ...] = ()
        count, samples = rows_of(self.layout, len(audio)), audio.shape[-1]
        firsts = range(0, samples, SAMPLES_PER_BLOCK)
        gains = [gain_of(self._raw(row, first, first + SAMPLES_PER_BLOCK) for first in firsts) for row in range(count)]
        self.gains_db = tuple(GAIN_RANGE_DB[1] if gain is None else gain for gain in gains)
        self._factors = [1.0 if gain is None else 10 ** (gain / 20) for gain in gains]

    def __len__(self) -> int:
        return len(self.gains_db)

    def read(self, row: int, first: int, last: int) -> Tensor:
        """Return the levelled samples `first` to `last` of a row: (1, channels of the AudioAE, last - first)."""
        raw = self._raw(row, first, last)
        return (raw * self._factors[row]).expand(self.ae_channels, -1)[None]

    def _raw(self, row: int, first: int, last: int) -> Tensor:
        part = self.audio[:, first:last]
        if self.layout in ("mid_side", "mid"):
            return ((part[:1] + part[1:]) if row == 0 else (part[:1] - part[1:])) / 2
        return part if self.layout == "joint" else part[row : row + 1]


def _choose_layout(audio: Tensor, wanted: str, ae_channels: int) -> str:
    channels = len(audio)
    if wanted not in LAYOUT_CHOICES:
        raise ValueError(f"channels={wanted} is unknown: choose one of {', '.join(LAYOUT_CHOICES)}")
    if wanted == "mid_side" and channels != 2:
        raise ValueError(f"channels=mid_side needs a sound of 2 channels, not of {channels}: choose channels=auto")
    if ae_channels > 1:
        if channels not in (1, ae_channels) or wanted != "auto":
            raise ValueError(
                f"this codec's autoencoder takes {ae_channels} channels together: give {ae_channels} channels or one, "
                "and choose channels=auto"
            )
        return "joint"
    if channels != 2 or wanted == "separate":
        return "separate"
    return "mid" if wanted == "auto" and torch.equal(audio[0], audio[1]) else "mid_side"


def channels_of(rows_RCS: Tensor, header: Header) -> Tensor:
    """Undo the gains of decoded rows (rows, channels of the AudioAE, samples); return the (channels, samples)."""
    factors = rows_RCS.new_tensor([10 ** (-gain / 20) for gain in header.gains_db])
    rows_RCS = rows_RCS * factors[:, None, None]
    if header.layout == "joint":
        return rows_RCS[0] if header.channels > 1 else rows_RCS[0].mean(0, keepdim=True)
    rows_RS = rows_RCS[:, 0]
    if header.layout == "mid_side":
        return torch.stack([rows_RS[0] + rows_RS[1], rows_RS[0] - rows_RS[1]])
    return rows_RS.expand(header.channels, -1) if header.layout == "mid" else rows_RS
