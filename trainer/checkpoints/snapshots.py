"""Snapshots of the two averages along a run, from which averages with other profiles are computed at its end.

A snapshot is a folder `averages/step_SAMPLES` in the format of a checkpoint that holds `ema/NAME` and `ema_wide/NAME`
alone. Snapshots are taken at fixed numbers of samples and pruned by a rule of their own, so that the end of a run
depends neither on when checkpoints were saved nor on kills.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoints import checkpoint
from trainer.checkpoints.ema import EMA, Averages
from trainer.checkpoints.names import checkpoints, samples_of
from trainer.checkpoints.profiles import Combination, Profile
from trainer.ranks import collective
from trainer.ranks.flat_ranges import FlatRange
from trainer.recipes.schema import TrainConfig

COUNT = 8
"""Equal parts of a stage. There is a snapshot after each of them but the last, whose averages are in memory."""

KINDS = ("ema", "ema_wide")
"""The prefixes of the two averages in a checkpoint: the first profile, and the second."""

logger = logging.getLogger(__name__)


def interval(settings: TrainConfig) -> int:
    """Return the samples between two snapshots; 0 if the stage takes none."""
    return max(1, settings.samples // COUNT) if settings.ema_profiles else 0


def prune(directory: Path, every: int) -> None:
    """Delete all snapshots but the first one at or after each multiple of `every` samples. Acts on rank 0 alone.

    Nothing is deleted unless the stage was made longer, which widens the interval.
    """
    if collective.rank() == 0:
        paths = checkpoints(directory)
        kept = {samples_of(path) // every: path for path in reversed(paths)}
        checkpoint.discard(path for path in paths if path not in kept.values())


def discard_after(directory: Path, samples: int) -> None:
    """Delete the snapshots that were taken after `samples` samples: the run continues from there. All ranks."""
    later = [path for path in checkpoints(directory) if samples_of(path) > samples]
    collective.on_rank_0(lambda: checkpoint.discard(later))


class StoredAverages:
    """The snapshots of a run before its end, and the averages at its end, which stay in host memory."""

    def __init__(self, directory: Path, ema: EMA, shapes: Mapping[str, FlatRange], samples: int) -> None:
        """Copy the averages of this rank to host memory, and look for undamaged snapshots. All ranks.

        Args:
            directory: the folder of the snapshots.
            ema: the averages after the last step.
            shapes: this rank's range of each trained parameter.
            samples: samples seen.
        """
        self.shapes = shapes
        self.last = {
            kind: {name: value.to("cpu", copy=True) for name, value in averages.items()}
            for kind, averages in zip(KINDS, (ema.averages, ema.wide), strict=True)
        }
        earlier = [path for path in checkpoints(directory) if 0 < samples_of(path) < samples]
        self.paths = collective.on_rank_0(lambda: _undamaged(earlier))
        times = [*map(samples_of, self.paths), samples]
        self.profiles = [Profile(width, time) for width in ema.profiles for time in times]

    def combined(self, combination: Combination) -> Averages:
        """Return a combination of the averages `profiles`, as this rank's ranges in host memory. All ranks.

        Raises:
            ValueError, OSError: a snapshot can't be loaded.
        """
        factors = iter(combination.factors)
        total = {name: torch.zeros_like(value) for name, value in self.last[KINDS[0]].items()}
        for kind in KINDS:
            for path in self.paths:
                _add(total, self._read(path, kind), next(factors))
            _add(total, self.last[kind], next(factors))
        return total

    def _read(self, path: Path, kind: str) -> Averages:
        read = {name: torch.empty_like(value) for name, value in self.last[kind].items()}
        ranges = {
            f"{kind}/{name}": FlatRange(value, self.shapes[name].shape, self.shapes[name].start)
            for name, value in read.items()
        }
        checkpoint.load(path, ranges, partly=True)
        return read


def _add(total: Averages, values: Mapping[str, Tensor], factor: float) -> None:
    torch._foreach_add_(list(total.values()), [values[name] for name in total], alpha=factor)


def _undamaged(paths: list[Path]) -> list[Path]:
    """Return the snapshots that pass their checksums, with a warning about each of the others."""
    found = []
    for path in paths:
        if problems := checkpoint.find_problems(path):
            logger.warning("the averages in %s are damaged and left out: %s", path, "; ".join(problems))
        else:
            found.append(path)
    return found
