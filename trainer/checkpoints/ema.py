"""Moving averages of the trained weights: one with a half-life in samples, or two with power-function profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer.checkpoints.profiles import exponent

Averages = dict[str, Tensor]


class EMA:
    """Averages of the values that this rank holds, in float32 and sharded among ranks like the values."""

    def __init__(
        self,
        values: Mapping[str, Tensor],
        *,
        halflife: float,
        profiles: Sequence[float] = (),
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the averages at the current values.

        Args:
            values: this rank's part of each trained parameter, float32: the tensors that training changes in place.
            halflife: the number of samples after which a weight's contribution has halved; 0 means no averaging.
            profiles: no widths, or the two relative widths σ_rel of power-function profiles that replace the half-life.
            refresh: called after `values` were changed here; updates the weights that the model computes with.
        """
        self.values, self.halflife, self.refresh = dict(values), halflife, refresh
        self.profiles = tuple(profiles)
        self.averages: Averages = {name: value.detach().clone() for name, value in self.values.items()}
        """The average with the half-life, or with the first profile."""
        self.wide: Averages = {name: value.clone() for name, value in self.averages.items()} if profiles else {}
        """The average with the second profile; empty if there are no profiles."""

    @torch.no_grad()
    def update(self, samples: int, batch: int) -> None:
        """Update the averages after a step of `batch` samples, with `samples` seen in total.

        A profile with the exponent γ keeps β = (1 - batch / samples)^(γ + 1) of its average (Karras et al. 2024,
        arXiv 2312.02696, section 3, with the samples as time), so that the initial weights are forgotten at once.
        """
        values = list(self.values.values())
        for averages, keep in self._kept(samples, batch):
            torch._foreach_lerp_(list(averages.values()), values, 1 - keep)

    def _kept(self, samples: int, batch: int) -> list[tuple[Averages, float]]:
        """Return each average and how much of it an update keeps.

        Early in training the half-life is limited to a fraction of the samples seen, because the random initial weights
        would otherwise dominate the average for long (the EMA warm-up of the same paper).
        """
        if self.profiles:
            keeps = [(1 - min(1.0, batch / samples)) ** (exponent(width) + 1) for width in self.profiles]
            return list(zip((self.averages, self.wide), keeps, strict=True))
        halflife = min(self.halflife, 0.05 * samples)
        return [(self.averages, 0.5 ** (batch / halflife) if halflife > 0 else 0.0)]

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
