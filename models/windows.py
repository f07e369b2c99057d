"""Latents of any length through networks that know windows of one length, with no seam where windows meet.

Shape suffixes: B clips, C channels of x0, Z of z, T frames, N vectors of z, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

WINDOWS_AT_ONCE = 8

Item = TypeVar("Item")


def starts(frames: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover all frames, `stride` apart; the last ends with the frames."""
    return [*range(0, max(0, frames - window), stride), max(0, frames - window)]


def encode(g: Callable[[Tensor], Tensor], x0_BCT: Tensor, *, window: int, pooling: int, margin: int) -> Tensor:
    """z (B, Z, N) of x0 by `g`, which sees a window at a time; of each but the first and the last end of x0 what lies
    within `margin` frames of the window's ends is another window's."""
    z_BZN = None
    for start in starts(x0_BCT.shape[-1], window, window - 2 * margin):
        part_BZN = g(x0_BCT[..., start : start + window])
        if z_BZN is None:
            z_BZN = part_BZN.new_empty(*part_BZN.shape[:2], x0_BCT.shape[-1] // pooling)
        kept = 0 if start == 0 else margin // pooling
        z_BZN[..., start // pooling + kept : start // pooling + part_BZN.shape[-1]] = part_BZN[..., kept:]
    assert z_BZN is not None
    return z_BZN


class Joint:
    """D and f on windows, as one network of any length: one sound that all windows agree on.

    The windows of a step of the sampler meet and hardly overlap, and those of the next step lie across where they met
    (`step` says which it is). All work on one x: what a window makes of it is what its neighbours go on from in the
    next step. So nothing is decided twice and then mixed, as where windows are sampled apart and cross-faded, nor are
    predictions averaged in overlaps, as in MultiDiffusion (arXiv 2302.08113). Of data that are -1 or +1 throughout,
    whose exact D is known, those leave 13 % and 11 % of the frames in between, and this none; it also costs a quarter
    less. `benchmarks/seams.py` measures it on a trained codec.

    Args:
        dit: D: (x, t, condition=…, …) → prediction.
        f: z → condition.
        window, pooling: frames of a window, and to a vector of z.
    """

    def __init__(self, dit: Callable[..., Tensor], f: Callable[[Tensor], Tensor], *, window: int, pooling: int) -> None:
        self.dit, self.f, self.window, self.pooling = dit, f, window, pooling
        self.step = 0

    def starts(self, frames: int) -> list[int]:
        """Where this step's windows begin."""
        shift = self.window // self.pooling // 2 * self.pooling if self.step % 2 else 0
        last = frames - self.window
        return sorted({0, last, *range(self.window - shift, last, self.window)})

    def __call__(self, x_BCT: Tensor, t_B: Tensor, *, condition: Tensor | None = None, **further: Any) -> Tensor:
        """D's prediction for x (B, C, T) at the levels t; the condition is z (B, Z, N) itself.

        Where windows do overlap, at the ends of x, a frame is taken from the one whose middle is nearer.
        """
        predicted_BCT, begins = torch.empty_like(x_BCT), self.starts(x_BCT.shape[-1])
        between = [(one + other + self.window) // 2 for one, other in pairwise(begins)]
        kept = zip(begins, [0, *between], [*between, x_BCT.shape[-1]], strict=True)
        for group in _groups(kept, max(1, WINDOWS_AT_ONCE // len(x_BCT))):
            starts = [start for start, _, _ in group]
            x_WBCT = torch.stack([x_BCT[..., start : start + self.window] for start in starts])
            if condition is not None:
                further = further | {"condition": self.f(self._z(condition, starts).flatten(0, 1))}
            parts = self.dit(x_WBCT.flatten(0, 1), t_B.repeat(len(group)), **further).unflatten(0, x_WBCT.shape[:2])
            for (start, first, last), part_BCT in zip(group, parts, strict=True):
                predicted_BCT[..., first:last] = part_BCT[..., first - start : last - start]
        return predicted_BCT

    def _z(self, z_BZN: Tensor, group: list[int]) -> Tensor:
        each = self.window // self.pooling
        return torch.stack([z_BZN[..., start // self.pooling : start // self.pooling + each] for start in group])


def _groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
