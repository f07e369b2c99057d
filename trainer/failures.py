"""How a training that fails is explained: in each rank's log, and to the user with what mends it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.health import Health
from trainer.memory.estimate import out_of_memory
from trainer.ranks.parallel import Parallel
from trainer.ranks.watchdog import Watchdog
from trainer.recipes.schema import Config, TrainConfig

logger = logging.getLogger(__name__)


@contextmanager
def explained_failures(config: Config, stage: str, parallel: Parallel, watchdog: Watchdog) -> Iterator[None]:
    """Write every failure to this rank's log; raise ValueError with the mend where memory ran out."""
    try:
        yield
    except Exception as error:
        # The watchdog of one rank ends it while the next one still writes: give that one time.
        with watchdog.patient():
            explanation = _explained(error, config, stage, parallel)
        if explanation is None:
            raise
        raise ValueError(explanation) from error


def _explained(error: Exception, config: Config, stage: str, parallel: Parallel) -> str | None:
    """Log a failure; returns an explanation where the error itself gives none."""
    if isinstance(error, ValueError | OSError):
        logger.error("%s: %s", stage, error)
        return None
    if not (isinstance(error, RuntimeError) and _is_out_of_memory(error)):
        logger.exception("%s: rank %d failed", stage, parallel.rank)
        return None
    peak, total = parallel.memory()
    explanation = out_of_memory(config, stage, parallel.world_size, peak, total)
    logger.error("%s: %s\n%s", stage, error, explanation)
    return explanation


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def hopeless_run(health: Health, stage: str, settings: TrainConfig, samples: int, *, no_checkpoint: bool) -> str:
    """What to say of a run whose steps are skipped one after another, and that cannot go back any more."""
    rewinds = f", after going back {health.rewinds} times" if health.rewinds else ""
    rewinds += ", and there is no checkpoint to go back to" if no_checkpoint else ""
    return (
        f"{stage} comes to nothing at {samples} samples: {len(health.skipped)} steps in a row were skipped{rewinds}, "
        f"the last because {health.skipped[-1]['why']}: lower {stage}.lr (now {settings.lr:g}) and start again in "
        f"another run_dir; incident.json names the samples"
    )
