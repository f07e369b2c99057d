"""The stages of a run that have begun or were submitted, and what SLURM says of their jobs. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.slurm import scheduler
from launch.slurm.submitted_jobs import submitted
from launch.status.stage_status import StageStatus
from trainer.stages import STAGES


def stages_of(run: Path) -> list[StageStatus]:
    """Return the stages that have begun or were submitted, in order. Raises ValueError if jobs.jsonl is damaged."""
    jobs = submitted(run)
    return [stage for name in STAGES if (stage := StageStatus(run / name, jobs.get(name))).job or stage.begun]


def ask_the_queue(stages: Sequence[StageStatus]) -> str:
    """Fill in the states of the stages' jobs with one query to SLURM; return the problem if SLURM does not answer."""
    numbers = list(dict.fromkeys(stage.job.job for stage in stages if stage.job is not None))
    try:
        found = scheduler.states(numbers)
    except scheduler.QueueError as error:
        return f"SLURM does not answer: {str(error).splitlines()[0].rpartition(' failed: ')[2]}"
    for stage in stages:
        if stage.job is not None:
            stage.elements = found[stage.job.job]
    return ""


def shown(run: Path) -> str:
    """Return a path as the user would write it: relative if it is below the current folder."""
    here = Path.cwd()
    return str(run.relative_to(here)) if run.is_absolute() and run.is_relative_to(here) and run != here else str(run)
