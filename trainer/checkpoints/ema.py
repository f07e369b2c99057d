"""Exponential moving average of the trained weights, its half-life counted in samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Averages of the values that this rank holds, in float32 beside them: cut among ranks as they are."""

    def __init__(
        self, values: Mapping[str, Tensor], *, halflife: float, refresh: Callable[[], None] = lambda: None
    ) -> None:
        """Begin with the values as they are.

        Args:
            values: this rank's part of each trained parameter, float32; the real ones, which training changes in place.
            halflife: after so many samples a weight's share has halved; 0 keeps no memory.
            refresh: what makes the weights that are computed with follow the values.
        """
        self.values, self.halflife, self.refresh = dict(values), halflife, refresh
        self.averages: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """The averages begin anew from the values."""
        self.averages = {name: value.detach().clone() for name, value in self.values.items()}

    @torch.no_grad()
    def update(self, samples: int, batch: int) -> None:
        """Take in the weights after a step of `batch` samples.

        While few samples were seen the half-life is a fraction of them, or the random start would weigh for long
        (Karras et al. 2024, arXiv 2312.02696, on EMA warm-up).
        """
        halflife = min(self.halflife, 0.05 * samples)
        keep = 0.5 ** (batch / halflife) if halflife > 0 else 0.0
        torch._foreach_lerp_(list(self.averages.values()), list(self.values.values()), 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages stand in for the weights inside the `with`, on all ranks together."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.values.items():
            kept = value.clone()
            value.copy_(self.averages[name])
            self.averages[name].copy_(kept)
        self.refresh()
