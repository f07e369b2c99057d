"""Cuts the crops of a batch out of clips, each as soon as its clip has been read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.places import Reads
from trainer.data.shard_set import ShardSet
from trainer.randomness import below


@dataclass(frozen=True)
class Spans:
    """Where the crops of n samples lie in their clips, in frames."""

    lengths: NDArray[np.int64]
    """(n,), the clips' lengths."""
    starts: NDArray[np.int64]
    """(n,), the starts of the crops; 0 for a clip that is shorter than a crop."""

    def part(self, start: int, end: int) -> Spans:
        """Return the spans start … end - 1."""
        return Spans(self.lengths[start:end], self.starts[start:end])


def draw_spans(shard_set: ShardSet, ids: NDArray[np.int64], bits: NDArray[np.int64], frames: int) -> Spans:
    """Return the spans of crops of `frames` frames that 64 random bits a sample (n,) choose from samples (n,)."""
    if shard_set.shortest_frames == shard_set.longest_frames:
        lengths = np.full(len(ids), shard_set.longest_frames)
    else:
        # A damaged row of the index may have any length; its sample is never cut.
        lengths = np.minimum(shard_set.index["frames"][ids].astype(np.int64), shard_set.longest_frames)
    if shard_set.longest_frames <= frames:
        return Spans(lengths, np.zeros_like(lengths))
    choices = np.maximum(0, lengths - frames) + 1
    return Spans(lengths, below(torch.from_numpy(choices), torch.from_numpy(bits)).numpy())


@dataclass(frozen=True)
class Planned:
    """How the samples of a batch that one reader reads are read and cut."""

    reads: Reads
    spans: Spans


@dataclass(frozen=True)
class Crop:
    """The samples of a batch that one reader reads; each field but `planned` is a column (B,)."""

    places: NDArray[np.int64]
    """Places in the reader's order."""
    ids: NDArray[np.int64]
    bits: NDArray[np.int64]
    """64 random bits for the start of each crop."""
    rows: NDArray[np.int64]
    """Rows of the batch."""
    planned: Planned | None = None
    """None if the reads are not planned yet."""


class Cuts:
    """Cuts the crops of a batch out of their clips, and pads the clips that are shorter.

    A crop is C windows of `frames` values, a clip's length apart. numpy copies them several times as fast as items of
    `frames` values each than as a matrix of values.

    Args:
        clips: (B, n), the memory into which clips are read, n at least C · frames of the longest clip.
        spans: the B crops.
        rows: (B,), their rows of the batch.
        out: (b, C, frames), contiguous: the batch.
        mask: (b, frames), true on entry; set to false where a sample is padded. None: no sample is padded.
    """

    def __init__(
        self,
        clips: NDArray[np.float16],
        spans: Spans,
        rows: NDArray[np.int64],
        out: NDArray[np.float16],
        mask: NDArray[np.bool] | None,
    ) -> None:
        self._channels, self._frames = out.shape[1:]
        self._values, self._row_bytes, self._out, self._mask = clips.reshape(-1), clips.strides[0], out, mask
        self._lengths, self._starts, self._rows = spans.lengths.tolist(), spans.starts.tolist(), rows.tolist()
        window = np.dtype((np.void, self._frames * clips.itemsize))
        count = max(0, clips.size - self._frames + 1)
        self._windows: NDArray[np.void] = np.ndarray(count, window, clips.data, 0, (clips.itemsize,))
        """The window at each value of `clips`; windows overlap."""
        self._crops = out.view(window)[..., 0]

    def __call__(self, row: int, start: int) -> None:
        """Cut the crop of the clip of a row (0 … B - 1), which begins at byte `start` of `clips`."""
        length, begin = self._lengths[row], start // 2
        size = self._channels * length
        if length >= self._frames:
            begin += self._starts[row]
            self._crops[self._rows[row]] = self._windows[begin : begin + size : length]
            return
        out_CT = self._out[self._rows[row]]
        out_CT[:, :length] = self._values[begin : begin + size].reshape(self._channels, length)
        if self._mask is not None:
            out_CT[:, length:] = 0
            self._mask[self._rows[row], length:] = False

    def replace(self, row: int, span: Spans) -> None:
        """Cut the crop of another sample, which has been read into the row (0 … B - 1) of `clips`."""
        (self._lengths[row],), (self._starts[row],) = span.lengths.tolist(), span.starts.tolist()
        self(row, row * self._row_bytes)
