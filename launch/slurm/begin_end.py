"""What a job's batch script does around its tasks: `python -m launch.slurm.begin_end begin|end STAGE [STATUS]`.

`begin` takes the run directory for this start and says where the ranks meet. `end` judges by the ranks' notes whether
the job is over, and requeues it where it is not. That is done here and not by a rank, as a requeue kills the ranks, and
a rank that asked for it would be killed before it knew. The script itself is killed by a cancellation and by a
requeue that SLURM makes, so whatever it does is wanted.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

from launch import owner
from launch.signals import MISTAKE
from launch.slurm import scheduler, submitted_jobs
from launch.slurm.attempt import TOKEN, Attempt, history, record
from launch.slurm.requeue_policy import DONE, OVER, REQUEUE, judge
from launch.slurm.slurm_task import rendezvous
from launch.slurm.variables import RUN, SUBMISSION, TASKS_PER_NODE
from trainer.checkpoints.names import checkpoints, samples_of
from trainer.stages import STAGES, is_trained

_PATIENCE = 10.0  # seconds until a note that a rank wrote on another node is seen here
_PERSISTENCE = 600.0  # seconds over which a requeue is tried again
_PAUSE = 10.0


def main() -> int:
    """Run the command; returns the script's exit status."""
    what, stage, *status = sys.argv[1:]
    folder = Path(os.environ[RUN]) / stage
    attempt = Attempt.here(folder)
    try:
        return _begin(attempt) if what == "begin" else _end(attempt, int(status[0]))
    except (ValueError, OSError) as error:
        print(f"spresso: {error}", file=sys.stderr)
        return MISTAKE


def _begin(attempt: Attempt) -> int:
    folder = attempt.stage_folder
    _close_before(attempt)
    if is_trained(folder.name):
        owner.take(folder, owner.by_job(attempt))
    _make_known(attempt)
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    record(folder, {"began": time.time(), **_who(attempt), "nodes": nodes, "count": os.environ["SLURM_JOB_NUM_NODES"]})
    settings = {TOKEN: attempt.token, **rendezvous(attempt.token)}
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in settings.items()))
    return 0


def _end(attempt: Attempt, status: int) -> int:
    folder = attempt.stage_folder
    held = owner.holder(folder)
    if is_trained(folder.name) and held is not None and held.token != attempt.token:
        print(f"spresso: {held.told} has taken over, this start of it is over", file=sys.stderr)
        return 0
    where = place(folder)
    past = ended(history(folder), attempt.job)
    verdict = judge(status, _notes(attempt, status), past, where, tasks=_tasks())
    entry = {"ended": time.time(), **_who(attempt), "place": where, "then": verdict.then}
    record(folder, entry | {"why": verdict.why, "failure": verdict.failure})
    print(
        f"spresso: {folder.name}: {verdict.then}{': ' if verdict.why else ''}{verdict.why}", file=sys.stderr, flush=True
    )
    if verdict.then == REQUEUE:
        return _requeue(attempt)
    if is_trained(folder.name):
        owner.release(folder, attempt.token)
    return 0 if verdict.then == DONE else MISTAKE if verdict.failure == "mistake" else 1


def _make_known(attempt: Attempt) -> None:
    """Add the job to those of the run, where it was handed to sbatch by hand."""
    root, stage, job = attempt.stage_folder.parent, attempt.stage_folder.name, attempt.job.partition("_")[0]
    known = submitted_jobs.submitted(root).get(stage)
    if known is None or known.job != job:
        log = str(root / "logs" / f"job_{job}.out")
        submitted_jobs.keep(
            root, [submitted_jobs.Submitted(stage, job, os.environ.get(SUBMISSION, ""), log, time.time())]
        )


def _close_before(attempt: Attempt) -> None:
    """Write down what became of an earlier start of this job whose script was killed."""
    lines = [entry for entry in history(attempt.stage_folder) if entry["job"] == attempt.job]
    if lines and "then" not in lines[-1] and lines[-1]["restart"] < attempt.restart:
        why = "SLURM requeued it: a node failed, or it was preempted without grace"
        before = {"job": attempt.job, "restart": lines[-1]["restart"], "ended": time.time()}
        entry = {**before, "place": place(attempt.stage_folder), "then": REQUEUE, "why": why, "failure": ""}
        record(attempt.stage_folder, entry | {"by": "slurm"})


def ended(lines: list[dict[str, Any]], job: str) -> list[dict[str, Any]]:
    """The lines that close a start of this job by its own script."""
    return [entry for entry in lines if "then" in entry and entry["job"] == job and entry.get("by") != "slurm"]


def place(folder: Path) -> int | None:
    """Samples of a stage's newest checkpoint, pieces that `evaluate` has, 0 for a stage that begins anew each time.

    None where it can't be told.
    """
    if not is_trained(folder.name):
        counted = STAGES[folder.name].progress_files
        return None if counted is None else sum(1 for _ in folder.glob(counted)) if counted else 0
    return max(map(samples_of, checkpoints(folder / "checkpoints")), default=0)


def _tasks() -> int:
    """How many ranks there were; 0 where that is not known. SLURM does not tell the script of an elastic job."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "0")) * int(os.environ.get(TASKS_PER_NODE, "0"))


def _notes(attempt: Attempt, status: int) -> dict[int, dict[str, Any]]:
    """Of the ranks; waits a little for those that have to be there."""
    tries = time.monotonic() + _PATIENCE
    while not (notes := attempt.notes()) and status == 0 and time.monotonic() < tries:
        time.sleep(0.5)
    return notes


def _requeue(attempt: Attempt) -> int:
    until, problem = time.monotonic() + _PERSISTENCE, ""
    while time.monotonic() < until:
        try:
            scheduler.control("requeue", attempt.job)
            time.sleep(_PAUSE)  # in which the script is ended
            return 0
        except scheduler.QueueError as error:
            problem = str(error)
            print(f"spresso: {problem}; tried again in {_PAUSE:.0f} s", file=sys.stderr, flush=True)
            time.sleep(_PAUSE)
    entry = {"ended": time.time(), **_who(attempt), "place": place(attempt.stage_folder), "then": OVER}
    record(attempt.stage_folder, entry | {"why": f"could not be requeued: {problem}", "failure": "requeue"})
    print("spresso: not requeued; `spresso requeue RUN` starts it again", file=sys.stderr)
    return 1


def _who(attempt: Attempt) -> dict[str, Any]:
    return {"job": attempt.job, "restart": attempt.restart, "host": socket.gethostname()}


if __name__ == "__main__":
    sys.exit(main())
