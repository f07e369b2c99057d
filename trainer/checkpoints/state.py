"""The state of a run: what is trained, and how far it is. It makes all that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoints import checkpoint
from trainer.checkpoints.ema import EMA
from trainer.health import Health
from trainer.ranks.flat_ranges import FlatRange, equal_ranges, split_among_copies, whole_ranges
from trainer.ranks.parallel import Parallel
from trainer.ranks.strategy import Strategy
from trainer.tasks import Task


class TrainState:
    """Trained weights, moments, moving averages and statistics under plain names, wherever the strategy has them; and
    the counters of the run. All methods are called by all ranks together.
    """

    def __init__(self, task: Task, strategy: Strategy, ema: EMA, health: Health, parallel: Parallel) -> None:
        self.task, self.strategy, self.ema, self.health, self.parallel = task, strategy, ema, health, parallel
        self.samples = 0
        """Samples seen: what the schedule, the log and the checkpoints go by."""
        self.steps = 0
        """Steps that the optimizer took."""
        self.passed_over = 0
        """Samples of the stream that were passed over when the run went back to an older checkpoint."""
        self.save_due = False
        """Whether a scheduled checkpoint has not been saved yet, because its step was one of several skipped ones."""
        self.saved_at = -1
        """Samples seen at the last checkpoint that was handed to the saver; -1: none yet."""

    @property
    def position(self) -> int:
        """Where in the stream the next global batch begins."""
        return self.samples + self.passed_over

    def advance(self, batch: int) -> None:
        """Count a step of so many samples; a skipped step has seen them, too."""
        self.samples += batch
        self.steps += self.health.taken

    def next_meta(self) -> dict[str, Any]:
        """What the checkpoint that is saved now says of the run's progress; notes that it is saved.

        A checkpoint is `good`, one to go back to, only if it was scheduled and no step was being skipped: the save of a
        run that is asked to stop is not, or a run in trouble would go back to where it was stopped.
        """
        good = self.save_due and self.health.good
        self.save_due = self.save_due and not good
        self.saved_at = self.samples
        return {
            "steps": self.steps,
            "passed_over": self.passed_over,
            "health": self.health.state(),
            "good": good,
            "unsaved": self.save_due,
        }

    def held(self) -> dict[str, FlatRange]:
        """This rank's ranges, views of the real tensors, which a load fills in place."""
        return whole_ranges(self._statistics()) | self._trained()

    def owned(self) -> dict[str, FlatRange]:
        """The same, each element on one rank alone: what a save writes."""
        rank, world_size = self.parallel.rank, self.parallel.world_size
        statistics = equal_ranges(self._statistics(), rank=rank, world_size=world_size)
        return statistics | split_among_copies(self._trained(), index=self.strategy.copy, copies=self.strategy.copies)

    def load(self, path: Path) -> None:
        """Become what a checkpoint holds, of whatever strategy and world size.

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
        self.samples, self.steps = meta["samples"], meta["steps"]
        self.passed_over, self.save_due = meta.get("passed_over", 0), meta.get("unsaved", False)
        self.health.restore(meta.get("health"))

    def go_back(self, path: Path) -> None:
        """Become what an older checkpoint of the run holds, but go on with the data from here."""
        position, rewinds, save_due = self.position, self.health.rewinds, self.save_due
        self.load(path)
        self.passed_over = position - self.samples
        self.save_due, self.saved_at = save_due, -1
        self.health.rewound(rewinds)

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
