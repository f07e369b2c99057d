"""Flat ranges: a rank's part [start, stop) of a flattened tensor, whatever strategy gave it that part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FlatRange:
    """Elements [start, stop) of a flattened tensor: what one rank owns of it, or wants of it."""

    data: Tensor
    """float32, one-dimensional and contiguous: the elements themselves, which a load fills in place."""
    shape: tuple[int, ...]
    """The whole tensor's own shape."""
    start: int = 0

    def __post_init__(self) -> None:
        assert self.data.dim() == 1, f"a range has one dimension, not {self.data.dim()}"
        assert self.data.is_contiguous(), "a range must be contiguous, or a load could not fill it in place"
        assert self.data.dtype == torch.float32, f"a checkpoint holds float32, not {self.data.dtype}"
        fits = 0 <= self.start <= self.stop <= math.prod(self.shape)
        assert fits, f"[{self.start}, {self.stop}) is not within a tensor of shape {self.shape}"

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.data.numel()


def whole_ranges(tensors: Mapping[str, Tensor]) -> dict[str, FlatRange]:
    """All of every tensor: what one process saves, and what every rank of DDP loads."""
    for name, tensor in tensors.items():
        assert tensor.is_contiguous(), f"{name} is not contiguous: a load could not fill it in place"
    return {name: FlatRange(tensor.detach().view(-1), tuple(tensor.shape)) for name, tensor in tensors.items()}


def equal_ranges(tensors: Mapping[str, Tensor], *, rank: int, world_size: int) -> dict[str, FlatRange]:
    """What this rank writes of tensors that every rank holds, as in DDP: one of `world_size` equal parts."""
    return split_among_copies(whole_ranges(tensors), index=rank, copies=world_size)


def split_among_copies(ranges: Mapping[str, FlatRange], *, index: int, copies: int) -> dict[str, FlatRange]:
    """Of ranges that `copies` ranks hold alike, what the rank with this index among them writes.

    The ranges laid end to end are cut into `copies` equal parts. Each part of a range is a view; some are empty.
    """
    if copies == 1:
        return dict(ranges)
    numbers = {name: held.data.numel() for name, held in ranges.items()}
    total = sum(numbers.values())
    first, last = total * index // copies, total * (index + 1) // copies
    parts, position = {}, 0
    for name, held in ranges.items():
        start, stop = (min(max(cut - position, 0), numbers[name]) for cut in (first, last))
        parts[name] = FlatRange(held.data[start:stop], held.shape, held.start + start)
        position += numbers[name]
    return parts
