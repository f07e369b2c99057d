"""Chooses the profile of the exported average after training, by the loss on held-out clips (arXiv 2312.02696)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch

from trainer.checkpoints.ema import Averages
from trainer.checkpoints.profiles import Profile, combine
from trainer.checkpoints.snapshots import StoredAverages
from trainer.checkpoints.state import TrainState
from trainer.formatting import aligned
from trainer.run_documents import TriedAverage

WIDTHS = (0.02, 0.03, 0.04, 0.05, 0.065, 0.08, 0.10, 0.125, 0.15, 0.20)
"""Relative widths that are tried, in addition to the two that the run kept."""

LARGEST_ERROR = 0.1
"""A width is not tried if the stored averages come no nearer to its profile (`profiles.Combination.error`)."""

Tried = list[TriedAverage]

logger = logging.getLogger(__name__)


def choose_average(snapshots: Path, state: TrainState, measure: Callable[..., float | None]) -> Tried | None:
    """Replace the narrow average in memory by the average whose held-out loss is lowest. All ranks.

    Args:
        snapshots: the folder of the run's snapshots.
        state: the run's state after its last step.
        measure: measures the loss of the average in memory; None if the run is asked to stop (`TrainingLog.measure`).

    Returns:
        The widths that were tried, narrow to wide; None if the run is asked to stop first.
    """
    ranges = {name: held.value for name, held in state.strategy.held().items()}
    stored = StoredAverages(snapshots, state.ema, ranges, state.samples)
    tried: Tried = []
    best: Averages = stored.last["ema"]
    for width in sorted({*WIDTHS, *state.ema.profiles}):
        combination = combine(stored.profiles, Profile(width, state.samples))
        if combination.error > LARGEST_ERROR:
            continue
        averages = stored.combined(combination)
        _use(state, averages)
        error = round(combination.error, 4)
        loss = measure(state.samples, kind="average", width=width, error=error)
        if loss is None:
            return None
        tried.append({"width": width, "error": error, "loss": loss})
        if chosen(tried) == width:
            best = averages
    _use(state, best)
    logger.info("%s: held-out loss by the width of the average\n%s", state.task.stage, table(tried))
    return tried


def chosen(tried: Tried) -> float:
    """Return the width with the lowest held-out loss, the narrowest if several have it."""
    return min(tried, key=_loss)["width"]


def _loss(row: TriedAverage) -> float:
    loss = row["loss"]
    return math.inf if loss is None or math.isnan(loss) else loss


def table(tried: Tried) -> str:
    """Format the widths with the error of their profiles and the held-out loss."""
    rows = [["width", "profile's error", "held-out loss", ""]]
    for row in tried:
        mark = "exported" if row["width"] == chosen(tried) else ""
        rows.append([f"{row['width']:g}", f"{row['error']:.1%}", f"{row['loss']:.6f}", mark])
    return aligned(rows, right=(0, 1, 2))


@torch.no_grad()
def _use(state: TrainState, averages: Averages) -> None:
    for name, value in state.ema.averages.items():
        value.copy_(averages[name])
