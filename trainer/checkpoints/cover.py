"""Whether the ranges that the ranks hold of each tensor cover every element exactly once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch.distributed as dist

from trainer.ranks import collective
from trainer.ranks.flat_ranges import FlatRange

_HASHES = 2**64


def check_cover(tensors: Mapping[str, FlatRange], group: dist.ProcessGroup | None) -> None:
    """Raise ValueError unless the ranks' ranges cover every tensor exactly once. All ranks.

    The ranks exchange two numbers each. Their ranges are exchanged only to name what is wrong.
    """
    shapes = sum(_hash(f"{tuple(owned.shape)} {name}") for name, owned in tensors.items())
    owned_here = ends((name, owned.start, owned.stop) for name, owned in tensors.items())
    of_ranks = collective.gather((shapes, owned_here), group)
    whole = ends((name, 0, math.prod(owned.shape)) for name, owned in tensors.items())
    alike = len({found for found, _ in of_ranks}) == 1
    if not alike or (sum(found for _, found in of_ranks) - whole) % _HASHES:
        _name_what_is_not_covered(tensors, group)


def ends(ranges: Iterable[tuple[str, int, int]]) -> int:
    """Return the sum, over ranges (name, start, stop), of a hash of the range's stop minus a hash of its start.

    Where ranges meet, their ends cancel out. So the sum over all ranks is that of whole tensors if and only if every
    element is covered once, but for a chance of 2⁻⁶⁴.
    """
    ends_of = (_hash(f"{stop} {name}") - _hash(f"{start} {name}") for name, start, stop in ranges if start < stop)
    return sum(ends_of) % _HASHES


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _name_what_is_not_covered(tensors: Mapping[str, FlatRange], group: dist.ProcessGroup | None) -> None:
    """Exchange all ranges, and raise ValueError with the first tensor that they do not cover once. All ranks."""
    spans_here = {name: (owned.shape, owned.start, owned.stop) for name, owned in tensors.items()}
    of_ranks = collective.gather(spans_here, group)
    for name in dict.fromkeys(name for spans in of_ranks for name in spans):
        if not all(name in spans for spans in of_ranks):
            raise ValueError(f"{name} is not on every rank: a rank that owns nothing of it must pass an empty range")
        if len({spans[name][0] for spans in of_ranks}) > 1:
            raise ValueError(f"{name} does not have the same shape on every rank")
        numel, position = math.prod(of_ranks[0][name][0]), 0
        cuts = sorted(spans[name][1:] for spans in of_ranks if spans[name][1] < spans[name][2])
        for start, stop in [*cuts, (numel, numel)]:
            if start != position:
                raise ValueError(f"the ranks' ranges of {name} have a gap or an overlap at {min(start, position)}")
            position = stop
