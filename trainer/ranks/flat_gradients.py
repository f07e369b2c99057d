"""Gradients that stay at their places in memory: views of one flat tensor, which ranks average in large parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_EXCHANGED_AT_ONCE = 2**24
"""Numbers of one collective. There is no backward pass to overlap with, so few large ones are best."""


class FlatGradients:
    """The gradients of float32 parameters, to which micro batches are added, and which the ranks average.

    A parameter's `grad` is its view of the flat tensor from the first gradient of a step on, and None before, so that
    the optimizer leaves out what had no gradient.
    """

    def __init__(self, parameters: Sequence[Tensor], *, world_size: int, exchanged_in: torch.dtype) -> None:
        """`exchanged_in`: the data type in which the ranks exchange gradients, float32 or bfloat16."""
        self.parameters = list(parameters)
        self.world_size, self.exchanged_in = world_size, exchanged_in
        counts = [value.numel() for value in self.parameters]
        self.flat = torch.zeros(sum(counts), device=self.parameters[0].device)
        parts = zip(self.flat.split(counts), self.parameters, strict=True)
        self.views = [part.view(value.shape) for part, value in parts]
        self._exchanges: list[tuple[dist.Work, Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, found: Sequence[Tensor | None]) -> list[int]:
        """Add a gradient for each parameter, or None; return the indices of the parameters that have one."""
        given = {index: value for index, value in enumerate(found) if value is not None}
        if given:
            torch._foreach_add_([self.views[index] for index in given], list(given.values()))
        self.show(given)
        return list(given)

    def show(self, indices: Iterable[int]) -> None:
        """Let the `grad` of these parameters be their views."""
        for index in indices:
            self.parameters[index].grad = self.views[index]

    @torch.no_grad()
    def start_average(self) -> None:
        """Start to replace the gradients by their mean over ranks. All ranks."""
        if self.world_size == 1:
            return
        for part in self.flat.split(_EXCHANGED_AT_ONCE):
            sent = part.to(self.exchanged_in).div_(self.world_size)  # divided first, as DDP does
            work = dist.all_reduce(sent, async_op=True)
            assert work is not None
            self._exchanges.append((work, sent, part))

    @torch.no_grad()
    def finish_average(self) -> None:
        """Wait for what `start_average` started. On a GPU, the device alone waits."""
        for work, sent, part in self._exchanges:
            work.wait()
            if sent is not part:
                part.copy_(sent)
        self._exchanges = []

    def clear(self) -> None:
        """Set the gradients to zero where they are."""
        self.flat.zero_()
        for parameter in self.parameters:
            parameter.grad = None
