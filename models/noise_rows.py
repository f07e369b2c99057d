"""The noise that a decode starts from, a few frames at a time: equal to `SPresso.noise`, without holding all of it.

`torch.randn((channels, frames), generator=…)` on the CPU draws one channel after the other, so the noise of a frame
lies at `channels` places of one long sequence. A generator for each channel is wound forward to where its channel
begins. torch makes normal numbers from blocks of 16 draws, and makes the sequence's last 16 numbers from new draws if
the sequence is no multiple of 16; so whatever is drawn in parts has to be drawn in whole blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 16
"""Draws that torch turns into normal numbers together."""
_SMALL = 2**20
"""Numbers that are drawn at once if there are no more of them in all: 4 MiB."""
_SKIPPED_AT_ONCE = 2**20


class NoiseRow:
    """Reads standard gaussian noise (channels, frames) from its first frame on, given a seed."""

    def __init__(self, seed: int, channels: int, frames: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        if channels * frames <= _SMALL:
            whole = torch.randn((channels, frames), generator=generator)
            self._channels: list[_Whole | _Wound] = [_Whole(channel) for channel in whole]
            return
        total, place, self._channels = channels * frames, 0, []
        for first in range(0, total, frames):
            block = first // _BLOCK * _BLOCK
            _skip(generator, block - place)
            self._channels.append(_Wound(generator, block, first, total))
            place = block

    def read(self, frames: int) -> Tensor:
        """Return the next frames (channels, frames)."""
        return torch.stack([channel.read(frames) for channel in self._channels])


class _Whole:
    """A channel that is in memory."""

    def __init__(self, channel: Tensor) -> None:
        self._left = channel

    def read(self, numbers: int) -> Tensor:
        read, self._left = self._left[:numbers], self._left[numbers:]
        return read


class _Wound:
    """A channel that is drawn when it is read.

    Args:
        generator: at the place `block` of the sequence; it is copied.
        block: a multiple of 16.
        first: the channel's first number in the sequence, in the block that begins at `block`.
        total: length of the whole sequence.
    """

    def __init__(self, generator: torch.Generator, block: int, first: int, total: int) -> None:
        self._generator = torch.Generator()
        self._generator.set_state(generator.get_state())
        self._drawn, self._place = torch.empty(0), block
        # the sequence's last whole block is drawn together with the numbers after it
        self._tail = total if total % _BLOCK == 0 else (total // _BLOCK - 1) * _BLOCK
        self._total = total
        self.read(first - block)

    def read(self, numbers: int) -> Tensor:
        missing = numbers - len(self._drawn)
        parts = [self._drawn]
        if (whole := min(-(-missing // _BLOCK) * _BLOCK, self._tail - self._place)) > 0:
            parts.append(self._draw(whole))
            missing -= whole
        if missing > 0:
            parts.append(self._draw(self._total - self._place))
        self._drawn = torch.cat(parts)
        read, self._drawn = self._drawn[:numbers], self._drawn[numbers:]
        return read

    def _draw(self, numbers: int) -> Tensor:
        self._place += numbers
        return torch.randn(numbers, generator=self._generator)


def _skip(generator: torch.Generator, draws: int) -> None:
    """Wind a generator forward; a byte takes a draw, as a normal number of 32 bits does."""
    while draws:
        now = min(draws, _SKIPPED_AT_ONCE)
        torch.empty(now, dtype=torch.uint8).random_(generator=generator)
        draws -= now
