"""Channels of a sound ↔ rows that are coded each by itself.

A row is what the AudioAE takes: a channel of one that is mono. Of stereo, mid (L + R) / 2 and side (L - R) / 2 are
coded rather than left and right, which have most of the sound twice. Every row is levelled by itself, as the models
were trained on levelled sounds, and its gain is written down: so a quiet side is coded as well as the mid, and comes
back as quiet. A row in which nothing is heard has the largest gain there is, and stays unheard whatever is decoded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.bitstream import GAIN_RANGE_DB, Header, rows_of
from models.loudness import gain_of

SAMPLES_PER_BLOCK = 2**20
"""Samples of a channel that are looked at at once."""
LAYOUT_CHOICES = ("auto", "separate", "mid_side")
"""What a user chooses from: `auto` is mid/side for stereo."""


class Rows:
    """The rows of a sound, made as they are read.

    Args:
        audio: (channels, samples).
        layout: `auto`, `separate` or `mid_side`.
        ae_channels: of the AudioAE.

    Attributes:
        layout: one of `models.bitstream.LAYOUTS`.
        gains_db: of each row.

    Raises:
        ValueError: a layout that this number of channels does not have.
    """

    def __init__(self, audio: Tensor, *, layout: str, ae_channels: int) -> None:
        self.audio, self.ae_channels = audio, ae_channels
        self.layout = _layout(audio, layout, ae_channels)
        self.gains_db: tuple[float, ...] = ()
        count, samples = rows_of(self.layout, len(audio)), audio.shape[-1]
        firsts = range(0, samples, SAMPLES_PER_BLOCK)
        gains = [gain_of(self._raw(row, first, first + SAMPLES_PER_BLOCK) for first in firsts) for row in range(count)]
        self.gains_db = tuple(GAIN_RANGE_DB[1] if gain is None else gain for gain in gains)
        self._factors = [1.0 if gain is None else 10 ** (gain / 20) for gain in gains]

    def __len__(self) -> int:
        return len(self.gains_db)

    def read(self, row: int, first: int, last: int) -> Tensor:
        """Samples of a row, levelled: (1, channels of the AudioAE, last - first)."""
        raw = self._raw(row, first, last)
        return (raw * self._factors[row]).expand(self.ae_channels, -1)[None]

    def _raw(self, row: int, first: int, last: int) -> Tensor:
        part = self.audio[:, first:last]
        if self.layout in ("mid_side", "mid"):
            return ((part[:1] + part[1:]) if row == 0 else (part[:1] - part[1:])) / 2
        return part if self.layout == "joint" else part[row : row + 1]


def _layout(audio: Tensor, wanted: str, ae_channels: int) -> str:
    channels = len(audio)
    if wanted not in LAYOUT_CHOICES:
        raise ValueError(f"channels are coded as {', '.join(LAYOUT_CHOICES)}, not as {wanted}")
    if wanted == "mid_side" and channels != 2:
        raise ValueError(f"mid and side are of two channels, not of {channels}: leave the choice out")
    if ae_channels > 1:
        if channels not in (1, ae_channels) or wanted != "auto":
            raise ValueError(
                f"this codec's autoencoder takes {ae_channels} channels together: give so many or one, and leave the "
                "choice of channels out"
            )
        return "joint"
    if channels != 2 or wanted == "separate":
        return "separate"
    return "mid" if wanted == "auto" and torch.equal(audio[0], audio[1]) else "mid_side"


def channels_of(rows_RCS: Tensor, header: Header) -> Tensor:
    """Channels (channels, samples) of decoded rows (rows, channels of the AudioAE, samples), their gains taken back."""
    factors = rows_RCS.new_tensor([10 ** (-gain / 20) for gain in header.gains_db])
    rows_RCS = rows_RCS * factors[:, None, None]
    if header.layout == "joint":
        return rows_RCS[0] if header.channels > 1 else rows_RCS[0].mean(0, keepdim=True)
    rows_RS = rows_RCS[:, 0]
    if header.layout == "mid_side":
        return torch.stack([rows_RS[0] + rows_RS[1], rows_RS[0] - rows_RS[1]])
    return rows_RS.expand(header.channels, -1) if header.layout == "mid" else rows_RS
