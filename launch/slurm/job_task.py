"""What each task of a SLURM job runs: `python -m launch.slurm.job_task STAGE`, the submission in SPRESSO_SUBMISSION.

Every task ends with a note of how (see `launch.slurm.attempt`); what becomes of the job is decided by the batch script
when all of them have ended (`launch.slurm.begin_end`). A task leaves with status 0 unless it failed: srun takes the
others down with one that does not, and they may still be saving.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from launch import owner
from launch.rank_count import usable_ranks
from launch.signals import MISTAKE
from launch.slurm.attempt import Attempt
from launch.slurm.deadline import Notice
from launch.slurm.slurm_task import SlurmTask
from launch.slurm.variables import GRACE, PARTS, RUN, SUBMISSION
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.stages import STAGES

_FAILED = 1
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR}
"""Errors of the system that come again until a person does something."""


def main() -> None:
    """One task, from its environment; does not return."""
    stage = sys.argv[1]
    folder = Path(os.environ[RUN]) / stage
    attempt, task = Attempt.here(folder), SlurmTask.here()
    os.environ.setdefault("OMP_NUM_THREADS", str(task.threads))

    def note(outcome: str, **facts: str) -> None:
        try:
            attempt.note(task.rank, outcome, **facts)
        except OSError as error:  # a full disk, most likely
            print(f"spresso: rank {task.rank} is {outcome} {facts}, and can't note it: {error}", file=sys.stderr)

    def leave(why: str) -> NoReturn:
        note("left", why=why)
        print(f"spresso: rank {task.rank} leaves: {why}", file=sys.stderr)
        _exit(0)

    notice = Notice(
        os.environ["SLURM_JOB_ID"], grace=float(os.environ[GRACE]), leave=leave, at_once=STAGES[stage].stops_at_once
    )
    with notice:
        try:
            outcome = _work(stage, task, notice)
            note(outcome, why=notice.why)
            status = 0
        except Exception as error:
            outcome, status = _failed(error, folder)
            note(outcome, type=type(error).__name__, message=str(error))
            if outcome != "mistake":
                traceback.print_exc()
            elif task.rank == 0:
                print(f"spresso: {error}", file=sys.stderr)
    _exit(status)


def _work(stage: str, task: SlurmTask, notice: Notice) -> str:
    """Do this task's share of a stage; returns "done", "stopped" or "idle"."""
    from launch import pipeline  # here, under the notice: importing torch takes seconds, in which a signal may come

    config = load_recipe(str(Path(os.environ[SUBMISSION]) / "config.yaml"), [])
    if STAGES[stage].trained:
        return pipeline.train(config, stage, how=lambda config, stage: _train(config, stage, task, notice))
    if task.rank > 0:
        return "idle"
    part, parts = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")), int(os.environ.get(PARTS, "1"))
    return pipeline.run_stage(config, stage, part=part, parts=parts)


def _train(config: Config, stage: str, task: SlurmTask, notice: Notice) -> str:
    from trainer.loop import train

    ranks, micro = usable_ranks(config, stage, task.count)
    if task.rank >= ranks:
        return "idle"
    if task.rank == 0 and ranks < task.count:
        batch = config.stage(stage).global_batch
        print(f"spresso: {ranks} of {task.count} ranks are used: {stage}.global_batch={batch} divides among them")
    config.parallel.processes, config.parallel.micro_batch = ranks, micro
    if "SLURM_RESTART_COUNT" in os.environ and config.checkpoint.resume == "never":
        config.checkpoint.resume = "auto"  # what is there is this job's own
    config.parallel.threads = config.parallel.threads or int(os.environ["OMP_NUM_THREADS"])
    task.join(ranks)
    folder = Path(os.environ[RUN]) / stage
    outcome = train(config, stage, stop=notice, permitted=lambda: owner.require(folder))
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    return outcome


def _failed(error: Exception, folder: Path) -> tuple[str, int]:
    """What kind of failure it is, and the exit status."""
    try:
        owner.require(folder)
    except owner.Superseded:
        if not STAGES[folder.name].stops_at_once:
            return "superseded", 0
    except (ValueError, OSError):
        pass
    lasting = isinstance(error, OSError) and error.errno in _LASTING
    if lasting or isinstance(error, ValueError | ImportError):
        return "mistake", MISTAKE
    return "failed", _FAILED


def _exit(status: int) -> NoReturn:
    """At once: the threads of a process group don't survive the interpreter's own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
