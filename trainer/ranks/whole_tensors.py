"""Tensors that every rank holds whole: each rank provides a share of their numbers, and all ranks get all of them.

The ranks of DDP load a checkpoint in this way. Together they read it once, where each of them would read all of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.ranks import collective
from trainer.ranks.flat_ranges import FlatRange

_BUCKET = 2**24  # numbers that one collective exchanges


def whole_on_all_ranks(names: Iterable[str], ranges: Mapping[str, FlatRange]) -> set[str]:
    """Return which names have a range on every rank that covers the whole tensor. All ranks, with the same names."""
    listed = list(names)
    whole = [name in ranges and ranges[name].is_whole for name in listed]
    if collective.world_size() > 1:
        flags = torch.tensor(whole, dtype=torch.int32, device=collective.device())
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        whole = flags.bool().tolist()
    return {name for name, on_all in zip(listed, whole, strict=True) if on_all}


def spread(tensors: Mapping[str, FlatRange]) -> None:
    """Complete tensors in place, of which each rank has filled its share. All ranks, with the same tensors.

    A rank's share is what `split_among_copies` returns with the rank as index and all ranks as copies.
    """
    ranks, rank = collective.world_size(), collective.rank()
    flat = _Concatenated([part.data for part in tensors.values()])
    if ranks == 1 or flat.numel == 0:
        return
    cuts = [flat.numel * number // ranks for number in range(ranks + 1)]
    longest = -(-flat.numel // ranks)
    count = min(longest, max(1, _BUCKET // ranks))
    mine = torch.zeros(count, device=collective.device())
    of_ranks = list(torch.empty(ranks, count, device=mine.device))
    for begin in range(0, longest, count):

        def views(number: int, begin: int = begin) -> Iterator[tuple[Tensor, slice]]:
            first, last = cuts[number] + begin, cuts[number + 1]
            return flat.views(first, min(first + count, last))

        for view, place in views(rank):
            mine[place].copy_(view)
        dist.all_gather(of_ranks, mine)
        for number, received in enumerate(of_ranks):
            for view, place in views(number) if number != rank else ():
                view.copy_(received[place])


class _Concatenated:
    """Flat tensors as one, without a copy."""

    def __init__(self, flats: list[Tensor]) -> None:
        self.flats = [flat for flat in flats if flat.numel()]
        self.ends = list(accumulate(flat.numel() for flat in self.flats))
        self.numel = self.ends[-1] if self.ends else 0

    def views(self, first: int, last: int) -> Iterator[tuple[Tensor, slice]]:
        """Yield views that cover the elements [first, last), each with its place among these elements."""
        position, number = first, bisect_right(self.ends, first)
        while position < last:
            flat, end = self.flats[number], self.ends[number]
            begin, stop = end - flat.numel(), min(end, last)
            yield flat[position - begin : stop - begin], slice(position - first, stop - first)
            position, number = stop, number + 1
