"""Explains why training failed: in each rank's log, and to the user together with a fix."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.health import Health
from trainer.memory.estimate import out_of_memory
from trainer.memory.snapshot import keep_snapshot
from trainer.ranks.parallel import Parallel
from trainer.ranks.watchdog import Watchdog
from trainer.recipes.schema import Config, TrainConfig

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = (
    "can't allocate memory",  # the CPU's allocator
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Failed to CUDA malloc",  # NCCL
    "Failed to CUDA calloc",
)
"""What those who run out of memory say, apart from torch's caching allocator, which raises OutOfMemoryError."""


@contextmanager
def explained_failures(
    config: Config, stage: str, parallel: Parallel, watchdog: Watchdog, *, logs: Path
) -> Iterator[None]:
    """Log every exception in this rank's log. If memory ran out, raise a ValueError that says how to save memory.

    A snapshot of a GPU's memory is kept in the folder `logs` then.
    """
    try:
        yield
    except Exception as error:
        # Extend the watchdog's timeout: it must not end this rank while the explanation is being written.
        with watchdog.allow_longer():
            explanation = _explained(error, config, stage, parallel, logs)
        if explanation is None:
            raise
        raise ValueError(explanation) from error


def _explained(error: Exception, config: Config, stage: str, parallel: Parallel, logs: Path) -> str | None:
    """Log an exception. Return an explanation of it if memory ran out; None otherwise."""
    if isinstance(error, ValueError | OSError):
        logger.error("%s: %s", stage, error)
        return None
    if not (isinstance(error, RuntimeError) and _is_out_of_memory(error)):
        logger.exception("%s: rank %d failed", stage, parallel.rank)
        return None
    # The snapshot comes first: `error` still holds the tensors of the step, and what follows needs memory of its own.
    snapshot = keep_snapshot(parallel.device, logs / f"memory_rank_{parallel.rank}.pickle")
    peak, total = parallel.memory()
    explanation = out_of_memory(config, stage, parallel.world_size, peak, total)
    if snapshot:
        explanation += f"\n{snapshot}"
    logger.error("%s: %s\n%s", stage, error, explanation)
    return explanation


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def hopeless_run(health: Health, stage: str, settings: TrainConfig, samples: int, *, no_checkpoint: bool) -> str:
    """Return the error message of a run that skips every step and cannot be rewound any more."""
    rewinds = f", after {health.rewinds} rewinds" if health.rewinds else ""
    rewinds += ", and there is no checkpoint to rewind to" if no_checkpoint else ""
    return (
        f"{stage} diverged at {samples} samples: {len(health.skipped)} consecutive steps were skipped{rewinds}; the "
        f"last one because {health.skipped[-1]['why']}: lower {stage}.lr (now {settings.lr:g}) and start again in "
        f"another run_dir=…; incident.json names the samples"
    )
