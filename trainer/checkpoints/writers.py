"""Which rank writes which ranges of a checkpoint: neighbouring ranks share a file if each of them owns little.

A thousand ranks would otherwise write a thousand small files at each save, which a shared disk takes badly, and whose
ranges fill the manifest. Where ranks own 64 MiB each or more, each rank writes its own ranges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.ranks import collective
from trainer.ranks.flat_ranges import FlatRange

LEAST_BYTES = 64 * 2**20
"""Bytes of a file, on average over a checkpoint's files, unless there is one file only."""

_NUMBER = 4  # bytes of a float32

Spans = dict[str, tuple[int, int]]
"""Name of a tensor → its elements [start, stop); tensors without elements are left out."""


def writer_of(rank: int, *, ranks: int, numbers: int) -> int:
    """Return the rank that writes a rank's ranges: the first one of its group of neighbours.

    Args:
        rank: the rank that owns the ranges.
        ranks: the number of ranks.
        numbers: the numbers that the checkpoint's tensors have in all.
    """
    files = max(1, min(ranks, _NUMBER * numbers // LEAST_BYTES))
    return -(-(rank * files // ranks) * ranks // files)


def spans_of(ranges: Mapping[str, FlatRange]) -> Spans:
    """Return the elements that a rank owns."""
    return {name: (owned.start, owned.stop) for name, owned in ranges.items() if owned.start < owned.stop}


def joined(of_ranks: Iterable[Spans]) -> list[Spans]:
    """Put the spans of neighbouring ranks into as few files as possible; a file holds one span of a tensor.

    One file holds all spans if each begins where that of the rank before it ends, as those of all strategies do.
    """
    files: list[Spans] = []
    for spans in of_ranks:
        for name, (start, stop) in spans.items():
            for file in files:
                if name not in file or file[name][1] == start:
                    file[name] = (file.get(name, (start, stop))[0], stop)
                    break
            else:
                files.append({name: (start, stop)})
    return files


def gather_to_writers(tensors: Mapping[str, FlatRange], group: dist.ProcessGroup | None) -> list[dict[str, FlatRange]]:
    """Return the ranges of each file that this rank writes; [] if another rank writes this rank's ranges. All ranks.

    Args:
        tensors: this rank's range of every tensor, in host memory.
        group: exchanges tensors in host memory.

    Raises:
        OSError: on every rank, if a rank has too little memory for the ranges of its group.
    """
    rank, ranks = collective.rank(), collective.world_size()
    numbers = sum(math.prod(owned.shape) for owned in tensors.values())
    writers = [writer_of(number, ranks=ranks, numbers=numbers) for number in range(ranks)]
    owned_here = {name: owned for name, owned in tensors.items() if owned.data.numel()}
    if writers == list(range(ranks)):
        return [owned_here] if owned_here else []
    neighbours = [number for number in range(ranks) if writers[number] == writers[rank]]
    of_ranks = collective.collect(spans_of(owned_here), group, senders=neighbours, receiver=writers[rank])

    # Allocate all memory. No rank sends before, because it would wait for ever for a rank that has no memory.
    packed, files = torch.empty(0), list[dict[str, FlatRange]]()

    def allocate() -> None:
        nonlocal packed
        files.extend(_allocated(joined(of_ranks), tensors))
        if writers[rank] != rank and owned_here:
            packed = torch.cat([owned.data for owned in owned_here.values()])

    collective.together(allocate, group)

    # Exchange the numbers.
    if len(packed):
        dist.send(packed, writers[rank], group)
    # On a rank that does not write, `of_ranks` is empty.
    for neighbour, spans in zip(neighbours, of_ranks, strict=False):
        if neighbour == rank:
            _place(files, spans, [owned.data for owned in owned_here.values()])
        elif spans:
            sizes = [stop - start for start, stop in spans.values()]
            received = torch.empty(sum(sizes))
            dist.recv(received, neighbour, group)
            _place(files, spans, received.split(sizes))
    return files


def _allocated(files: Iterable[Spans], tensors: Mapping[str, FlatRange]) -> list[dict[str, FlatRange]]:
    """Return memory for the spans of each file."""
    return [
        {
            name: FlatRange(torch.empty(stop - start), tensors[name].shape, start)
            for name, (start, stop) in spans.items()
        }
        for spans in files
    ]


def _place(files: list[dict[str, FlatRange]], spans: Spans, values: Iterable[Tensor]) -> None:
    """Copy the numbers of each span into the file that holds the span."""
    for (name, (start, stop)), numbers in zip(spans.items(), values, strict=True):
        held = next(file[name] for file in files if name in file and file[name].start <= start < file[name].stop)
        held.data[start - held.start : stop - held.start].copy_(numbers)
