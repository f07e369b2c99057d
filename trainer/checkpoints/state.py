"""All of a run that a checkpoint holds: trained weights, moments, moving averages, statistics; under plain names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoints import checkpoint
from trainer.checkpoints.ema import EMA
from trainer.ranks.flat_ranges import FlatRange, equal_ranges, split_among_copies, whole_ranges
from trainer.ranks.parallel import Parallel
from trainer.ranks.strategy import Strategy
from trainer.tasks import Task


class TrainState:
    """What is trained, wherever the strategy has it. All its methods are called by all ranks together."""

    def __init__(self, task: Task, strategy: Strategy, ema: EMA, parallel: Parallel) -> None:
        self.task, self.strategy, self.ema, self.parallel = task, strategy, ema, parallel

    def held(self) -> dict[str, FlatRange]:
        """This rank's ranges, views of the real tensors, which a load fills in place."""
        return whole_ranges(self._statistics()) | self._trained()

    def owned(self) -> dict[str, FlatRange]:
        """The same, each element on one rank alone: what a save writes."""
        rank, world_size = self.parallel.rank, self.parallel.world_size
        statistics = equal_ranges(self._statistics(), rank=rank, world_size=world_size)
        return statistics | split_among_copies(self._trained(), index=self.strategy.copy, copies=self.strategy.copies)

    def load(self, path: Path) -> dict[str, Any]:
        """Fill all of it from a checkpoint, of whatever strategy and world size; returns the checkpoint's `meta`.

        Raises:
            ValueError: it does not hold exactly this, or belongs to another frozen base.
        """
        base = checkpoint.read_manifest(path)["meta"].get("base", "")
        if base != self.task.base_hash:
            raise ValueError(
                f"{path} was trained on a base model with the hash {base[:12]}, and this one has "
                f"{self.task.base_hash[:12]}: give the base of then with pretrained.folder=…"
            )
        meta = checkpoint.load(path, self.held())
        self.strategy.refresh()
        self.strategy.set_steps(meta["steps"])
        return meta

    def averaged_weights(self) -> dict[str, Tensor]:
        """The moving averages, whole and in host memory; empty on all ranks but the first, which exports them."""
        ranges = split_among_copies(self._averages(), index=self.strategy.copy, copies=self.strategy.copies)
        return self.parallel.whole(ranges)

    def _statistics(self) -> Mapping[str, Tensor]:
        return {f"statistics/{name}": value for name, value in self.task.statistics.items()}

    def _trained(self) -> dict[str, FlatRange]:
        ranges: dict[str, FlatRange] = {}
        for name, held in self.strategy.held().items():
            average = FlatRange(self.ema.averages[name], held.value.shape, held.value.start)
            parts = {"param": held.value, "ema": average, **held.moments}
            ranges |= {f"{kind}/{name}": part for kind, part in parts.items()}
        return ranges

    def _averages(self) -> dict[str, FlatRange]:
        return {name.removeprefix("ema/"): part for name, part in self._trained().items() if name.startswith("ema/")}


@torch.no_grad()
def fill_task(fresh: Task, weights: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Task:
    """A stage's fresh Task with what was trained of it."""
    for name, parameter in fresh.learned.items():
        parameter.copy_(weights[name])
    for name, value in fresh.statistics.items():
        value.copy_(statistics[name])
    return fresh
