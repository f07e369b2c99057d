"""Latents of any length through networks that know windows of one length, with no seam where windows meet.

Shape suffixes: B clips, C channels of x0, Z of z, T frames, N vectors of z, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

WINDOWS_AT_ONCE = 8


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
    """D and f on windows, as one network of any length (MultiDiffusion, arXiv 2302.08113).

    All windows see one x. Where they overlap, their predictions are averaged at every step of the sampler, each with a
    weight that falls towards its window's ends: so there is one sound, which all windows agree on, instead of several
    that would be mixed.

    Args:
        dit: D: (x, t, condition=…, …) → prediction.
        f: z → condition.
        window, pooling: frames of a window, and to a vector of z.
    """

    def __init__(self, dit: Callable[..., Tensor], f: Callable[[Tensor], Tensor], *, window: int, pooling: int) -> None:
        self.dit, self.f, self.window, self.pooling = dit, f, window, pooling
        self.stride = max(pooling, int(0.75 * window) // pooling * pooling)

    def __call__(self, x_BCT: Tensor, t_B: Tensor, *, condition: Tensor | None = None, **further: Any) -> Tensor:
        """D's prediction for x (B, C, T) at the levels t; the condition is z (B, Z, N) itself."""
        total_BCT, weights_T = torch.zeros_like(x_BCT), x_BCT.new_zeros(x_BCT.shape[-1])
        weight_T = _triangle(self.window).to(x_BCT)
        for group in _groups(starts(x_BCT.shape[-1], self.window, self.stride), max(1, WINDOWS_AT_ONCE // len(x_BCT))):
            x_WBCT = torch.stack([x_BCT[..., start : start + self.window] for start in group])
            if condition is not None:
                further = further | {"condition": self.f(self._z(condition, group).flatten(0, 1))}
            parts = self.dit(x_WBCT.flatten(0, 1), t_B.repeat(len(group)), **further).unflatten(0, x_WBCT.shape[:2])
            for start, part_BCT in zip(group, parts, strict=True):
                total_BCT[..., start : start + self.window] += part_BCT * weight_T
                weights_T[start : start + self.window] += weight_T
        return total_BCT.div_(weights_T)

    def _z(self, z_BZN: Tensor, group: list[int]) -> Tensor:
        each = self.window // self.pooling
        return torch.stack([z_BZN[..., start // self.pooling : start // self.pooling + each] for start in group])


def _triangle(length: int) -> Tensor:
    """Weights that rise to the middle and fall again, nowhere zero."""
    rising = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(rising, rising.flip(0))


def _groups(items: list[int], size: int) -> Iterator[list[int]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
