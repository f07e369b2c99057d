"""The state of a run that a checkpoint stores: trained tensors and progress counters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoints import checkpoint
from trainer.checkpoints.ema import EMA
from trainer.checkpoints.manifest import read_manifest
from trainer.health import Health
from trainer.ranks import collective
from trainer.ranks.flat_ranges import FlatRange, equal_ranges, split_among_copies, whole_ranges
from trainer.ranks.parallel import Parallel
from trainer.ranks.strategy import Strategy
from trainer.tasks import Task


class TrainState:
    """The tensors and counters that a checkpoint stores.

    Tensors are trained weights, Adam moments, moving averages and statistics, named independently of the strategy that
    shards them. All ranks call each method together.
    """

    def __init__(self, task: Task, strategy: Strategy, ema: EMA, health: Health, parallel: Parallel) -> None:
        self.task, self.strategy, self.ema, self.health, self.parallel = task, strategy, ema, health, parallel
        self.samples = 0
        """Samples seen. The schedule, the log and the names of checkpoints depend on this counter."""
        self.steps = 0
        """Steps that the optimizer took."""
        self.skipped_samples = 0
        """Samples of the stream that the run skipped when it was rewound to an older checkpoint."""
        self.save_due = False
        """Whether a scheduled checkpoint is still to be saved, because steps were being skipped when its time came."""
        self.left_out: list[str] = []
        """Work that was due at `samples`, but left out because the run was asked to stop: `held_out`, `listening`."""
        self.saved_at = -1
        """Samples seen at the last checkpoint that was handed to the saver; -1 if there was none."""

    @property
    def position(self) -> int:
        """The position in the stream at which the next global batch begins."""
        return self.samples + self.skipped_samples

    def advance(self, batch: int) -> None:
        """Count the samples of a step as seen, whether or not it is skipped."""
        self.samples += batch

    def next_meta(self) -> dict[str, Any]:
        """Return the progress metadata of the checkpoint that is saved now, and record that it is saved.

        A checkpoint is `good`, and a run may be rewound to it, only if it was scheduled and no step was being skipped.
        The checkpoint that a run saves when it is stopped is not `good`: otherwise an interruption would change where a
        run is rewound to.
        """
        good = self.save_due and self.health.good
        self.save_due = self.save_due and not good
        self.saved_at = self.samples
        return {
            "steps": self.steps,
            "passed_over": self.skipped_samples,
            "health": self.health.state(),
            "good": good,
            "unsaved": self.save_due,
            **({"left_out": self.left_out} if self.left_out else {}),
        }

    def held(self) -> dict[str, FlatRange]:
        """Return this rank's ranges as views of the tensors in use: a load fills them in place."""
        return whole_ranges(self._statistics()) | self._trained()

    def owned(self) -> dict[str, FlatRange]:
        """Return the ranges that this rank saves: as `held`, but each element belongs to exactly one rank."""
        rank, world_size = self.parallel.rank, self.parallel.world_size
        statistics = equal_ranges(self._statistics(), rank=rank, world_size=world_size)
        return statistics | split_among_copies(self._trained(), index=self.strategy.copy, copies=self.strategy.copies)

    def load(self, path: Path) -> None:
        """Load a checkpoint, whatever strategy and world size it was saved with.

        Raises:
            ValueError: its tensors are not exactly those of this run, or it was trained on another frozen base.
            OSError: on every rank, if any rank can't read it now.
        """
        base = collective.on_rank_0(lambda: read_manifest(path)["meta"].get("base", ""))
        if base != self.task.base_hash:
            raise ValueError(
                f"{path} was trained on a base model with the hash {base[:12]}, but this run's base model has "
                f"{self.task.base_hash[:12]}: give the checkpoint's base model with pretrained.folder=…"
            )
        meta = checkpoint.load(path, self.held())
        self.strategy.refresh()
        self.strategy.set_steps(meta["steps"])
        self.samples, self.steps = meta["samples"], meta["steps"]
        self.skipped_samples, self.save_due = meta.get("passed_over", 0), meta.get("unsaved", False)
        self.left_out = meta.get("left_out", [])
        self.health.restore(meta.get("health"))

    def go_back(self, path: Path) -> None:
        """Load an older checkpoint of this run, but continue with the data at the current position."""
        position, rewinds, save_due = self.position, self.health.rewinds, self.save_due
        self.load(path)
        self.skipped_samples = position - self.samples
        self.save_due, self.saved_at, self.left_out = save_due, -1, []
        self.health.rewound(rewinds)

    def averaged_weights(self) -> dict[str, Tensor]:
        """Gather the whole moving averages into rank 0's host memory; empty on all other ranks."""
        owned = self.owned_averages()
        return self.parallel.whole(
            {name.removeprefix("ema/"): part for name, part in owned.items() if name.startswith("ema/")}
        )

    def owned_averages(self) -> dict[str, FlatRange]:
        """Return the ranges of the averages that this rank saves in a snapshot: `ema/NAME` and `ema_wide/NAME`."""
        averages = {name: part for name, part in self._trained().items() if name.startswith(("ema/", "ema_wide/"))}
        return split_among_copies(averages, index=self.strategy.copy, copies=self.strategy.copies)

    def _statistics(self) -> Mapping[str, Tensor]:
        return {f"statistics/{name}": value for name, value in self.task.statistics.items()}

    def _trained(self) -> dict[str, FlatRange]:
        ranges: dict[str, FlatRange] = {}
        for name, held in self.strategy.held().items():
            average = FlatRange(self.ema.averages[name], held.value.shape, held.value.start)
            parts = {"param": held.value, "ema": average, **held.moments}
            if self.ema.wide:
                parts["ema_wide"] = FlatRange(self.ema.wide[name], held.value.shape, held.value.start)
            ranges |= {f"{kind}/{name}": part for kind, part in parts.items()}
        return ranges


@torch.no_grad()
def fill_task(fresh: Task, weights: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> Task:
    """Copy trained weights and statistics into a stage's fresh Task, and return it."""
    for name, parameter in fresh.learned.items():
        parameter.copy_(weights[name])
    for name, value in fresh.statistics.items():
        value.copy_(statistics[name])
    return fresh
