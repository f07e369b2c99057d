"""Exponential moving average of the trained weights, its half-life counted in samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages of the named parameters, in float32 beside them."""

    def __init__(self, parameters: dict[str, nn.Parameter], *, halflife: float) -> None:
        """`halflife`: after so many samples a weight's share has halved; 0 keeps no memory."""
        self.parameters, self.halflife = parameters, halflife
        self.averages: dict[str, Tensor] = {name: value.detach().float().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, samples: int, batch: int) -> None:
        """Take in the weights after a step of `batch` samples.

        While few samples were seen the half-life is a fraction of them, or the random start would weigh for long
        (Karras et al. 2024, arXiv 2312.02696, on EMA warm-up).
        """
        halflife = min(self.halflife, 0.05 * samples)
        keep = 0.5 ** (batch / halflife) if halflife > 0 else 0.0
        values = [value.detach().float() for value in self.parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), values, 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages stand in for the weights inside the `with`."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(kept)
