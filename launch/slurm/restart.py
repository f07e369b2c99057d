"""Begins the next generation of a job's ranks within the job, if the policy of requeues allows another start."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from launch import owner
from launch.slurm.attempt import Attempt, history, record
from launch.slurm.begin_end import ended, place, who
from launch.slurm.news import tell_of_end
from launch.slurm.requeue_policy import REQUEUE, RESTART, Verdict, judge
from launch.slurm.slurm_task import free_port
from trainer.file_names import printable_lines

_HARDWARE = ("uncorrectable ECC error", "uncorrectable NVLink error", "hardware error", "hardware stack error")
"""Words of CUDA's errors after which the same GPU would fail again."""


def begin_next(attempt: Attempt, notes: Mapping[int, Mapping[str, Any]], *, tasks: int) -> tuple[Attempt, int] | None:
    """Make the stage's directory the next generation's, and record that.

    Args:
        attempt: the attempt whose ranks have ended.
        notes: notes of those that failed, by rank.
        tasks: number of the job's tasks.

    Returns:
        The next attempt and its MASTER_PORT; None if the batch script has to decide what becomes of the job.
    """
    folder = attempt.stage_folder
    try:
        samples, past = place(folder), ended(history(folder), attempt.job)
        verdict = judge(1, notes, past, samples, tasks=tasks)
        if verdict.then != REQUEUE or any(words in verdict.why for words in _HARDWARE):
            return None
        begun = attempt.next()
        owner.take(folder, owner.by_job(begun))  # from here on, ranks that still live can't write
        begun.folder.mkdir(parents=True, exist_ok=True)
        entry = {"ended": time.time(), **who(attempt), "place": samples, "then": RESTART}
        record(folder, entry | {"why": verdict.why, "failure": verdict.failure})
        nodes = {"nodes": os.environ.get("SLURM_JOB_NODELIST", ""), "count": os.environ["SLURM_JOB_NUM_NODES"]}
        record(folder, {"began": time.time(), **who(begun), **nodes})
        port = free_port(begun.token)
    except (ValueError, OSError) as error:
        print(f"spresso: no restart in the job: {printable_lines(str(error))}", file=sys.stderr, flush=True)
        return None
    told = f"restarted in the job at sample {samples} because {verdict.why}"
    print(f"spresso: {printable_lines(told)}", file=sys.stderr, flush=True)
    _tell(attempt, Verdict(RESTART, told, verdict.failure), past, samples)
    return begun, port


def _tell(attempt: Attempt, verdict: Verdict, past: list[dict[str, Any]], samples: int | None) -> None:
    """Tell `log.notify` in a process of its own, which may take its time and use threads."""
    if os.fork() == 0:
        try:
            tell_of_end(attempt, verdict, past, samples)
        finally:
            os._exit(0)
