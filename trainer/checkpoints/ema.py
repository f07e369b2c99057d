"""Exponential moving average (EMA) of the trained weights, with a half-life in samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Averages of the values that this rank holds, in float32 and sharded among ranks like the values."""

    def __init__(
        self, values: Mapping[str, Tensor], *, halflife: float, refresh: Callable[[], None] = lambda: None
    ) -> None:
        """Start the averages at the current values.

        Args:
            values: this rank's part of each trained parameter, float32: the tensors that training changes in place.
            halflife: the number of samples after which a weight's contribution has halved; 0 means no averaging.
            refresh: called after `values` were changed here; updates the weights that the model computes with.
        """
        self.values, self.halflife, self.refresh = dict(values), halflife, refresh
        self.averages: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Reset the averages to the current values."""
        self.averages = {name: value.detach().clone() for name, value in self.values.items()}

    @torch.no_grad()
    def update(self, samples: int, batch: int) -> None:
        """Update the averages after a step of `batch` samples, with `samples` seen in total.

        Early in training the half-life is limited to a fraction of the samples seen, because the random initial weights
        would otherwise dominate the averages for long (Karras et al. 2024, arXiv 2312.02696, on EMA warm-up).
        """
        halflife = min(self.halflife, 0.05 * samples)
        keep = 0.5 ** (batch / halflife) if halflife > 0 else 0.0
        torch._foreach_lerp_(list(self.averages.values()), list(self.values.values()), 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the weights by their averages inside the `with`. All ranks."""
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
