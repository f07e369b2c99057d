"""Flat ranges: a rank's part [start, stop) of a flattened tensor, in a form that is the same for all strategies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FlatRange:
    """Elements [start, stop) of a flattened tensor, which one rank owns or loads."""

    data: Tensor
    """The elements: float32, one-dimensional and contiguous. A load fills them in place."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int = 0
    """Index of the first element in the flattened tensor."""

    def __post_init__(self) -> None:
        assert self.data.dim() == 1, f"a range has one dimension, not {self.data.dim()}"
        assert self.data.is_contiguous(), "a range must be contiguous, or a load could not fill it in place"
        assert self.data.dtype == torch.float32, f"a checkpoint holds float32, not {self.data.dtype}"
        fits = 0 <= self.start <= self.stop <= math.prod(self.shape)
        assert fits, f"[{self.start}, {self.stop}) is not within a tensor of shape {self.shape}"

    @property
    def stop(self) -> int:
        """Index one past the last element."""
        return self.start + self.data.numel()

    @property
    def is_whole(self) -> bool:
        """Whether the range covers the whole tensor."""
        return self.data.numel() == math.prod(self.shape)


def whole_ranges(tensors: Mapping[str, Tensor]) -> dict[str, FlatRange]:
    """Return ranges that cover every tensor completely, as a single process saves and every rank of DDP loads."""
    for name, tensor in tensors.items():
        assert tensor.is_contiguous(), f"{name} is not contiguous: a load could not fill it in place"
    return {name: FlatRange(tensor.detach().view(-1), tuple(tensor.shape)) for name, tensor in tensors.items()}


def equal_ranges(tensors: Mapping[str, Tensor], *, rank: int, world_size: int) -> dict[str, FlatRange]:
    """Return the part that this rank saves of tensors that every rank holds: one of `world_size` equal parts."""
    return split_among_copies(whole_ranges(tensors), index=rank, copies=world_size)


def split_among_copies(ranges: Mapping[str, FlatRange], *, index: int, copies: int) -> dict[str, FlatRange]:
    """Return the part that one rank saves of ranges that `copies` ranks hold identically.

    The whole tensors, one after another, are cut into `copies` equal parts, of which this is number `index`. The
    returned ranges are views of what lies in that part; some are empty. Where the ranges of two ranks meet, the parts
    that they save with the same index meet, too, so that one file can hold both as one range.
    """
    if copies == 1:
        return dict(ranges)
    total = sum(math.prod(held.shape) for held in ranges.values())
    first, last = total * index // copies, total * (index + 1) // copies
    parts, position = {}, 0
    for name, held in ranges.items():
        start, stop = (min(max(cut - position, held.start), held.stop) for cut in (first, last))
        parts[name] = FlatRange(held.data[start - held.start : stop - held.start], held.shape, start)
        position += math.prod(held.shape)
    return parts
