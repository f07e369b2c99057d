"""Where the latents of batches lie on disk, and in what order and by how many system calls they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GAP = 16 << 10  # a gap of this many bytes between two samples is cheaper to read than to skip
_BUFFERS = 512  # per read; Linux allows 1024
_COLUMNS = ("shard", "frames", "x0_offset", "x0_length", "x0_crc32")


@dataclass(frozen=True)
class Places:
    """The places of n samples in the order of the index, which is that of the disk."""

    columns: NDArray[np.int64]
    """(6, n): each sample's shard, its offset, length and checksum, and the start and end of its bytes in the batch."""

    def __len__(self) -> int:
        return self.columns.shape[1]

    def __iter__(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Return an iterator over the samples: (shard, offset, length, checksum, start, end)."""
        return zip(*self.columns.tolist(), strict=True)

    def part(self, start: int, end: int) -> Places:
        """Return the places start … end - 1."""
        return Places(self.columns[:, start:end])


@dataclass(frozen=True)
class Reads:
    """The reads of one set's samples of a batch."""

    alone: Places
    """The samples that have no neighbour in the batch."""
    runs: list[Places] = field(default_factory=list)
    """Samples of one shard that lie so close together that one system call reads them all."""
    damaged: list[int] = field(default_factory=list)
    """The rows of the batch whose row of the index is damaged."""


def plan_reads(
    index: NDArray[np.void],
    ids: NDArray[np.int64],
    *,
    rows: NDArray[np.int64],
    batches: NDArray[np.int64],
    count: int,
    fits: Callable[[Mapping[str, NDArray[Any]]], NDArray[np.bool]],
    row_bytes: int,
) -> list[Reads]:
    """Return the reads of each of `count` batches.

    Args:
        index: the set's index.
        ids: (n,), the samples of all batches as rows of the index.
        rows: (n,), the samples' rows in their batches.
        batches: (n,), each sample's batch, 0 … count - 1.
        fits: returns whether rows of the index, given by column, are undamaged and fit a row of a batch.
        row_bytes: the bytes from one row of a batch to the next.
    """
    # The index has the samples in their order on disk, and the sort of one number a sample is the fastest.
    sequence = np.argsort(batches * len(index) + ids)
    ids, rows, batches = ids[sequence], rows[sequence], batches[sequence]
    # To gather single columns is several times as fast as to gather whole rows of the index.
    found = {name: index[name][ids] for name in _COLUMNS}
    intact = fits(found)
    damaged = np.flatnonzero(~intact)
    if damaged.size:
        found = {name: column[intact] for name, column in found.items()}
    places = _places(found, rows[intact] * row_bytes)
    reads = _grouped(places, batches[intact], count)
    for batch, row in zip(batches[damaged].tolist(), rows[damaged].tolist(), strict=True):
        reads[batch].damaged.append(row)
    return reads


def _places(found: Mapping[str, NDArray[Any]], starts: NDArray[np.int64]) -> Places:
    """Return the places of samples by their columns of the index and the starts of their bytes in the batch (n,)."""
    columns = np.empty((6, len(starts)), np.int64)
    columns[0], columns[2], columns[3] = found["shard"], found["x0_length"], found["x0_crc32"]
    columns[1] = found["x0_offset"].view(np.int64)  # an impossible offset becomes a negative one, which is refused
    columns[4] = starts
    np.add(starts, columns[2], out=columns[5])
    return Places(columns)


def _grouped(places: Places, batches: NDArray[np.int64], count: int) -> list[Reads]:
    """Return the reads of each of `count` batches, for samples that are sorted by their batch (n,)."""
    shard, begin, length, *_ = places.columns
    gap = begin[1:] - (begin + length)[:-1]
    separate = (batches[1:] != batches[:-1]) | (shard[1:] != shard[:-1]) | (gap < 0) | (gap > _GAP)
    begins, ends = np.ones(len(batches), bool), np.ones(len(batches), bool)
    begins[1:] = ends[:-1] = separate
    alone = np.flatnonzero(begins & ends)
    bounds = np.searchsorted(batches[alone], np.arange(count + 1)).tolist()
    alone_places = Places(places.columns[:, alone])
    reads = [Reads(alone_places.part(start, end)) for start, end in pairwise(bounds)]
    first, last = np.flatnonzero(begins & ~ends), np.flatnonzero(ends & ~begins)
    for number, start, end in zip(batches[first].tolist(), first.tolist(), (last + 1).tolist(), strict=True):
        for at in range(start, end, _BUFFERS // 2):
            reads[number].runs.append(places.part(at, min(end, at + _BUFFERS // 2)))
    return reads
