"""What a batch script does before and after its tasks: `python -m launch.slurm.begin_end begin|end STAGE [STATUS]`.

`begin` makes this attempt the owner of the stage's directory and prints the rendezvous address of the ranks. `end`
decides from the ranks' notes whether the job is over, and requeues the job if it is not. The batch script requeues, not
a rank, because a requeue kills the ranks before they could learn whether it worked. A cancellation or a requeue by
SLURM itself also kills the batch script, so `end` never undoes either.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from launch import owner
from launch.signals import MISTAKE
from launch.slurm import leave_out, scheduler, submitted_jobs
from launch.slurm.attempt import TOKEN, Attempt, history, record
from launch.slurm.news import tell_of_end
from launch.slurm.requeue_policy import DONE, OVER, REQUEUE, Verdict, judge
from launch.slurm.slurm_task import free_port, rendezvous
from launch.slurm.start_check import check_nodes
from launch.slurm.variables import PARTS, RUN, SUBMISSION, SUPERVISORS, TASKS_PER_NODE
from models.disk_errors import LASTING, PASSING
from models.documents import DamagedDocument
from models.readable import describe_os_error
from trainer.checkpoints.names import checkpoints, samples_of
from trainer.file_names import printable_lines
from trainer.recipes.reading import load_recipe
from trainer.stages import STAGES, is_trained, trained_stages

T = TypeVar("T")

_PATIENCE = 10.0  # seconds until a note that a rank wrote on another node is visible here
_PERSISTENCE = 600.0  # seconds for which a requeue, or reading the records, is retried
_PAUSE = 10.0  # seconds between two tries


def main() -> int:
    """Run the command; return the exit status of the batch script."""
    what, stage, *status = sys.argv[1:]
    folder = Path(os.environ[RUN]) / stage
    attempt = Attempt.here(folder)
    try:
        return _begin(attempt) if what == "begin" else _end(attempt, int(status[0]))
    except (ValueError, OSError) as error:
        told = describe_os_error(error) if isinstance(error, OSError) else str(error)
        print(f"spresso: {printable_lines(told)}", file=sys.stderr)
        return MISTAKE


def _begin(attempt: Attempt) -> int:
    folder = attempt.stage_folder
    _close_killed_attempt(attempt)
    if is_trained(folder.name):
        _readable(lambda: owner.take(folder, owner.by_job(attempt)))
    _add_to_submitted(attempt)
    if is_trained(folder.name) and (faulty := _check_nodes(attempt)) and _requeue_without(attempt, faulty):
        return 1
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    record(folder, {"began": time.time(), **who(attempt), "nodes": nodes, "count": os.environ["SLURM_JOB_NUM_NODES"]})
    settings = {TOKEN: attempt.token, **rendezvous(attempt.token)}
    if is_trained(folder.name):
        settings[SUPERVISORS] = str(free_port(f"{attempt.token}/supervisors"))
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in settings.items()))
    return 0


def _check_nodes(attempt: Attempt) -> dict[str, list[str]]:
    """Check the nodes, and name those that fail; return those without which the job is to be requeued."""
    if SUBMISSION not in os.environ:  # a script of an older version
        return {}
    stage = attempt.stage_folder.name
    try:
        cluster = load_recipe(str(Path(os.environ[SUBMISSION]) / "config.yaml"), []).cluster.of(stage)
    except (ValueError, OSError):  # the ranks say so
        return {}
    if not cluster.check_nodes:
        return {}
    found = check_nodes(cluster, free_port(f"{attempt.token}/check"))
    for line in [*found.remarks, *(f"{node} {fault}" for node, faults in found.faults.items() for fault in faults)]:
        print(f"spresso: {printable_lines(line)}", file=sys.stderr, flush=True)
    run = attempt.stage_folder.parent
    lines = [line for name in trained_stages() for line in _readable(lambda: history(run / name))]  # noqa: B023
    before = leave_out.left_out(lines, attempt.job)  # by any stage: a point of a sweep runs several in one job
    return {node: found.faults[node] for node in leave_out.chosen(list(found.faults), before, cluster.leave_out)}


def _requeue_without(attempt: Attempt, faulty: dict[str, list[str]]) -> bool:
    """Requeue the job without some nodes; return whether SLURM does so, else the job begins all the same."""
    why = "; ".join(f"{node} {faults[0]}" for node, faults in faulty.items())
    try:
        leave_out.requeue_without(attempt.job, list(faulty))
    except scheduler.QueueError as error:
        print(f"spresso: {error}: the job begins all the same", file=sys.stderr, flush=True)
        return False
    entry = {"ended": time.time(), **who(attempt), "place": _place_now(attempt.stage_folder)[0], "then": REQUEUE}
    left_out = {"why": why, "failure": "", "left_out": list(faulty), "by": "slurm"}
    record(attempt.stage_folder, entry | left_out)
    print(f"spresso: requeued without {', '.join(faulty)}", file=sys.stderr, flush=True)
    time.sleep(_PAUSE)  # SLURM kills this script meanwhile
    return True


def _end(attempt: Attempt, status: int) -> int:
    folder, attempt = attempt.stage_folder, attempt.newest()
    held = _holder(folder)
    if is_trained(folder.name) and held is not None and (held.job, held.restart) != (attempt.job, attempt.restart):
        print(f"spresso: {held.told} has taken over, so this attempt ends", file=sys.stderr)
        return 0
    progress, refused = _place_now(folder)
    past = ended(_readable(lambda: history(folder)), attempt.job)
    verdict = judge(status, _notes(attempt, status), past, progress, tasks=_rank_count())
    if refused and verdict.then == REQUEUE:
        verdict = Verdict(OVER, refused, failure="mistake")
    entry = {"ended": time.time(), **who(attempt), "place": progress, "then": verdict.then}
    record(folder, entry | {"why": verdict.why, "failure": verdict.failure})
    told = f"{folder.name}: {verdict.then}{': ' if verdict.why else ''}{verdict.why}"
    print(f"spresso: {printable_lines(told)}", file=sys.stderr, flush=True)
    tell_of_end(attempt, verdict, past, progress)  # before a requeue, by which SLURM ends this script
    if verdict.then == REQUEUE:
        return _requeue(attempt)
    if is_trained(folder.name):
        owner.release(folder, held.token if held is not None else attempt.token)
    return 0 if verdict.then == DONE else MISTAKE if verdict.failure == "mistake" else 1


def _holder(folder: Path) -> owner.Owner | None:
    """Return the owner of the stage's directory; None, with a line in the log, if its record is damaged."""
    try:
        return _readable(lambda: owner.holder(folder))
    except DamagedDocument as error:
        print(f"spresso: {printable_lines(str(error))}: the job goes on as its owner", file=sys.stderr)
        return None


def _add_to_submitted(attempt: Attempt) -> None:
    """Add the job to the submitted jobs of the run, if the user gave its script to sbatch by hand.

    The list only informs, so that a job starts whatever has become of it.
    """
    root, stage, job = attempt.stage_folder.parent, attempt.stage_folder.name, attempt.job
    if os.environ.get(PARTS) != "1":  # the run has all parts of the array; of a sweep's array, it has one element
        job = job.partition("_")[0]
    try:
        known = _readable(lambda: submitted_jobs.undamaged(root))
        log = next((item.log for item in known.values() if item.job == job), str(root / "logs" / f"job_{job}.out"))
        if stage not in known or known[stage].job != job:
            ours = submitted_jobs.Submitted(stage, job, os.environ.get(SUBMISSION, ""), log, time.time())
            submitted_jobs.keep(root, [ours])
    except (ValueError, OSError) as error:
        told = describe_os_error(error) if isinstance(error, OSError) else str(error)
        print(f"spresso: {printable_lines(told)}: `spresso status` will not show this job", file=sys.stderr)


def _close_killed_attempt(attempt: Attempt) -> None:
    """Record the end of the previous attempt of this job, if its batch script was killed before it could."""
    past = _readable(lambda: history(attempt.stage_folder))
    lines = [entry for entry in past if entry["job"] == attempt.job]
    if lines and "then" not in lines[-1] and lines[-1]["restart"] < attempt.restart:
        why = "SLURM requeued the job: a node failed, or the job was preempted without a grace period"
        last: dict[str, Any] = {key: lines[-1][key] for key in ("job", "restart", "generation") if key in lines[-1]}
        entry = {**last, "ended": time.time(), "place": _place_now(attempt.stage_folder)[0], "then": REQUEUE}
        record(attempt.stage_folder, entry | {"why": why, "failure": "", "by": "slurm"})


def ended(lines: list[dict[str, Any]], job: str) -> list[dict[str, Any]]:
    """Return the lines with which this job's own script closed its attempts."""
    return [entry for entry in lines if "then" in entry and entry["job"] == job and entry.get("by") != "slurm"]


def place(folder: Path) -> int | None:
    """Return how far a stage is: samples of its newest checkpoint, or pieces that `evaluate` has finished.

    0 for a stage that begins anew each time; None if the progress of the stage cannot be measured.
    """
    if not is_trained(folder.name):
        counted = STAGES[folder.name].progress_files
        return None if counted is None else sum(1 for _ in folder.glob(counted)) if counted else 0
    return max(map(samples_of, checkpoints(folder / "checkpoints")), default=0)


def _place_now(folder: Path) -> tuple[int | None, str]:
    """Return how far a stage is, None if that can't be read; and why only a person can mend that, else an empty text.

    An error that may pass, such as EIO, is named in the log.
    """
    try:
        return place(folder), ""
    except OSError as error:
        number, problem = error.errno, f"{describe_os_error(error)}: the progress of {folder.name} can't be read"
    if number in LASTING:
        return None, f"{problem}; allow reading there or mount it, then submit the job again with `spresso requeue RUN`"
    print(f"spresso: {printable_lines(problem)} now", file=sys.stderr, flush=True)
    return None, ""


def _readable(read: Callable[[], T]) -> T:
    """Return what `read` returns, and repeat it for a while after an error that may pass, such as EIO."""
    until = time.monotonic() + _PERSISTENCE
    while True:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING - LASTING or time.monotonic() >= until:
                raise
            told = printable_lines(describe_os_error(error))
        print(f"spresso: {told}; retrying in {_PAUSE:.0f} s", file=sys.stderr, flush=True)
        time.sleep(_PAUSE)


def _rank_count() -> int:
    """Return the number of ranks; 0 if unknown, because SLURM does not give it to the script of an elastic job."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "0")) * int(os.environ.get(TASKS_PER_NODE, "0"))


def _notes(attempt: Attempt, status: int) -> dict[int, dict[str, Any]]:
    """Return the ranks' notes; after a success, wait for the shared file system to show them."""
    deadline = time.monotonic() + _PATIENCE
    while not (notes := attempt.notes()) and status == 0 and time.monotonic() < deadline:
        time.sleep(0.5)
    return notes


def _requeue(attempt: Attempt) -> int:
    until, problem = time.monotonic() + _PERSISTENCE, ""
    while time.monotonic() < until:
        try:
            scheduler.control("requeue", attempt.job)
            time.sleep(_PAUSE)  # SLURM kills this script meanwhile
            return 0
        except scheduler.QueueError as error:
            problem = str(error)
            print(f"spresso: {problem}; retrying in {_PAUSE:.0f} s", file=sys.stderr, flush=True)
            time.sleep(_PAUSE)
    entry = {"ended": time.time(), **who(attempt), "place": _place_now(attempt.stage_folder)[0], "then": OVER}
    failed = Verdict(OVER, f"could not be requeued: {problem}", failure="requeue")
    record(attempt.stage_folder, entry | {"why": failed.why, "failure": failed.failure})
    tell_of_end(attempt, failed, [], None)
    print("spresso: the job was not requeued; `spresso requeue RUN` submits it again", file=sys.stderr)
    return 1


def who(attempt: Attempt) -> dict[str, Any]:
    """Return what each line of the history says of its attempt."""
    generation = {"generation": attempt.generation} if attempt.generation else {}
    return {"job": attempt.job, "restart": attempt.restart, **generation, "host": socket.gethostname()}


if __name__ == "__main__":
    sys.exit(main())
