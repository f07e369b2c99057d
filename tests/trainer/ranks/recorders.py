"""A stand-in for CUDA graphs on a CPU, for strategies and for whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trainer.ranks.flat_gradients import FlatGradients
from trainer.recipes.schema import Config


class RerunningRecorder:
    """Repeats work by running it again, into the tensors of its first run.

    As with CUDA graphs, a result has no values before it is repeated, a repetition spoils all other results, and it
    does not repeat what Python did: to let parameters have gradients.
    """

    def __init__(self) -> None:
        self.rehearsals = self.repetitions = 0
        self.results: list[list[Tensor]] = []

    def rehearse(self, work: Callable[[], object]) -> None:
        self.rehearsals += 1
        work()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        result = work()
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.results.append(leaves)
        spoil(leaves)

        def repeat() -> None:
            self.repetitions += 1
            with mock.patch.object(FlatGradients, "show"):
                fresh = [leaf.clone() for leaf in tree_leaves(work()) if isinstance(leaf, Tensor)]
            for others in self.results:
                spoil(others)
            for old, new in zip(leaves, fresh, strict=True):
                old.copy_(new)

        return result, repeat


def spoil(values: list[Tensor]) -> None:
    for value in values:
        value.fill_(float("nan"))


@contextmanager
def graphs_on_cpu() -> Iterator[list[RerunningRecorder]]:
    """Let `parallel.graph` work on a CPU; yields the recorders that strategies make."""
    made: list[RerunningRecorder] = []

    def make(device: torch.device) -> RerunningRecorder:
        made.append(RerunningRecorder())
        return made[-1]

    with (
        mock.patch("trainer.ranks.parallel.require_cuda"),
        mock.patch("trainer.ranks.parallel.CudaRecorder", make),
    ):
        yield made


def with_graphs(config: Config) -> Config:
    """Turn `parallel.graph` on in a recipe for a CPU, which reading the recipe would refuse."""
    config.parallel.graph = True
    return config
