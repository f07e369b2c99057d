"""What one rank of a job does: its share of a stage, and a note of how it ended (`launch.slurm.attempt`).

When all ranks have ended, the batch script decides what becomes of the job (`launch.slurm.begin_end`). A rank exits
with status 0 unless it failed, because srun kills the other tasks after any other status, and they may still be saving.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from launch import owner
from launch.error_line import describe_error
from launch.rank_count import usable_ranks
from launch.signals import MISTAKE
from launch.slurm.attempt import Attempt, note_of
from launch.slurm.deadline import Notice
from launch.slurm.slurm_task import SlurmTask
from launch.slurm.variables import GRACE, PARTS, RUN, SUBMISSION
from models.disk_errors import LASTING
from trainer.cpus import usable_threads
from trainer.file_names import printable_lines
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.stages import STAGES

_FAILED = 1


def load_config() -> Config:
    """Read the config that was submitted with the job. Raises ValueError, OSError."""
    return load_recipe(str(Path(os.environ[SUBMISSION]) / "config.yaml"), [])


def work(
    stage: str,
    attempt: Attempt,
    task: SlurmTask,
    config: Config | None = None,
    tell: Callable[[Mapping[str, Any]], object] = lambda note: None,
) -> NoReturn:
    """Do this task's share of a stage, and end the process.

    Args:
        stage: the stage.
        attempt: the attempt that the task is part of.
        task: the task.
        config: the job's config, if it has been read already.
        tell: called with the note when it has been written.
    """

    def note(outcome: str, **facts: str) -> None:
        written = note_of(outcome, **facts)
        try:
            attempt.keep(task.rank, written)
        except OSError as error:  # most likely a full disk
            print(f"spresso: rank {task.rank} is {outcome} {facts}, but its note failed: {error}", file=sys.stderr)
        tell(written)

    def leave(why: str) -> NoReturn:
        note("left", why=why)
        print(f"spresso: rank {task.rank} ends: {why}", file=sys.stderr)
        _exit(0)

    notice = Notice(
        os.environ["SLURM_JOB_ID"], grace=float(os.environ[GRACE]), leave=leave, at_once=STAGES[stage].stops_at_once
    )
    with notice:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, notice.signals)  # a supervisor blocks them until now
        try:
            outcome = _share(stage, attempt, task, notice, config)
            note(outcome, why=notice.reason())
            status = 0
        except Exception as error:
            outcome, status = _classify(error, attempt.stage_folder)
            message = describe_error(error) if outcome == "mistake" else str(error)
            note(outcome, type=type(error).__name__, message=message)
            if outcome != "mistake":
                print(printable_lines(traceback.format_exc()), end="", file=sys.stderr)
            elif task.rank == 0:
                print(f"spresso: {message}", file=sys.stderr)
    _exit(status)


def _share(stage: str, attempt: Attempt, task: SlurmTask, notice: Notice, config: Config | None) -> str:
    """Do this task's share of a stage; return "done", "stopped" or "idle"."""
    # imported under the notice: importing torch takes seconds, during which a signal may arrive
    from launch import pipeline

    config = config or load_config()
    if STAGES[stage].trained:
        return pipeline.train(config, stage, how=lambda config, stage: _train(config, attempt, task, notice))
    if task.rank > 0:
        return "idle"
    part, parts = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")), int(os.environ.get(PARTS, "1"))
    return pipeline.run_stage(config, stage, part=part, parts=parts)


def _train(config: Config, attempt: Attempt, task: SlurmTask, notice: Notice) -> str:
    from trainer.loop import train

    stage = attempt.stage_folder.name
    ranks, micro = usable_ranks(config, stage, task.count)
    if task.rank >= ranks:
        return "idle"
    if task.rank == 0 and ranks < task.count:
        batch = config.stage(stage).global_batch
        print(f"spresso: {ranks} of {task.count} ranks are used, so that {stage}.global_batch={batch} divides evenly")
    config.parallel.processes, config.parallel.micro_batch = ranks, micro
    again = "SLURM_RESTART_COUNT" in os.environ or attempt.generation > 0
    if again and config.checkpoint.resume == "never":
        config.checkpoint.resume = "auto"  # the checkpoints are from an earlier start of this job
    config.parallel.threads = config.parallel.threads or usable_threads(1)
    task.join(ranks)
    folder = Path(os.environ[RUN]) / stage
    outcome = train(config, stage, stop=notice, require_ownership=lambda: owner.require(folder))
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    return outcome


def _classify(error: Exception, folder: Path) -> tuple[str, int]:
    """Return the outcome to note for an error, and the exit status."""
    try:
        owner.require(folder)
    except owner.Superseded:
        if not STAGES[folder.name].stops_at_once:
            return "superseded", 0
    except (ValueError, OSError):
        pass
    lasting = isinstance(error, OSError) and error.errno in LASTING
    if lasting or isinstance(error, ValueError | ImportError):
        return "mistake", MISTAKE
    return "failed", _FAILED


def _exit(status: int) -> NoReturn:
    """End the process at once: the threads of a process group do not survive the interpreter's shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
