"""Runs supervisors whose workers do what a plan says: `python -m tests.launch.slurm.supervised`.

Each line of the standard input asks for a supervisor, which is forked, because importing takes longer than a test. Its
environment has MARKS, a folder, and PLAN: for each generation, what the worker of each rank does, as JSON. Each worker
leaves a file `RANK.GENERATION` with its PID, its attempt's token and its MASTER_PORT, and each supervisor `RANK.status`
with its exit status.

With the argument `train`, the workers train as those of a job do, and the environment has DIES in place of PLAN: during
what the first worker of rank 1 is killed, see `_DEATHS`; empty if it lives.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from launch.slurm.quiet_imports import quiet_imports

with quiet_imports():  # a process with threads is not forked
    from launch.slurm import supervisor, worker
from launch.slurm.attempt import TOKEN, Attempt
from launch.slurm.forked import Tell
from launch.slurm.slurm_task import SlurmTask
from launch.slurm.supervisor import Supervisor, Work
from launch.slurm.variables import RUN
from models.atomic_write import write_whole
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config


def marks() -> Path:
    """Return the folder of marks."""
    return Path(os.environ["MARKS"])


def act(stage: str, attempt: Attempt, task: SlurmTask, config: Config, tell: Tell) -> NoReturn:
    """Do what the plan says, in a worker."""
    place = f"{task.rank}.{attempt.generation}"
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    facts = [os.getpid(), os.environ[TOKEN], os.environ["MASTER_PORT"]]
    write_whole(marks() / place, json.dumps(facts))
    plan = json.loads(os.environ["PLAN"])
    for word in plan[min(attempt.generation, len(plan) - 1)][task.rank].split("; "):
        what, _, rest = word.partition(" ")
        if what == "wait":  # for a file
            while not (marks() / rest).exists():
                time.sleep(0.01)
        elif what == "term":  # until it is asked to leave
            while not stopping:
                time.sleep(0.01)
        elif what == "hang":
            time.sleep(10**6)
        elif what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "exit":
            os._exit(int(rest))
        elif what == "mark":
            (marks() / rest).touch()
        else:  # outcome, status, and the type and message of an error
            status, _, error = rest.partition(" ")
            kind, _, message = error.partition(" ")
            note = {"outcome": what, "host": "here", "time": time.time()}
            note |= {"type": kind, "message": message} if kind else {}
            attempt.keep(task.rank, note)
            tell(note)
            os._exit(int(status))
    raise AssertionError("the plan has no end")


def train(stage: str, attempt: Attempt, task: SlurmTask, config: Config, tell: Tell) -> NoReturn:
    """Train, in a worker. Each rank writes a file of its own at a save, as the ranks of a large model do."""
    from trainer.checkpoints import writers

    writers.LEAST_BYTES = 1
    if (task.rank, attempt.generation) == (1, 0) and os.environ["DIES"]:
        _DEATHS[os.environ["DIES"]]()
    worker.work(stage, attempt, task, config, tell)


def _die_in_second_save() -> None:
    """Be killed once rank 0 has written its file of the second checkpoint, before the manifest is written."""
    from trainer.checkpoints import checkpoint

    write, saves = checkpoint._write, []

    def writes(path: Path, held: Any) -> Any:
        saves.append(path)
        if len(saves) == 2:
            while not path.with_name("rank_00000.safetensors").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, held)

    checkpoint._write = writes


def _die_in_second_evaluation() -> None:
    """Be killed after a batch of the held-out loss at the second checkpoint."""
    from trainer.log.held_out import HeldOutLoss

    batches, evaluations = HeldOutLoss._batches, []

    def dying(loss: Any, device: Any) -> Iterator[Any]:
        evaluations.append(device)
        for batch in batches(loss, device):
            yield batch
            if len(evaluations) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    HeldOutLoss._batches = dying  # type: ignore[method-assign]


_DEATHS = {"save": _die_in_second_save, "evaluation": _die_in_second_evaluation}


def supervise(rank: int, count: int, most: int, settings: Sequence[str] = (), work: Work = act) -> NoReturn:
    """Be a rank's supervisor."""
    overrides = [f"cluster.restarts_in_job={most}", "health.hang_seconds=300", *settings]
    attempt, task = Attempt(Path(os.environ[RUN]) / "pretrain", "12", 0), SlurmTask(rank, count, rank, (count,))
    config = load_recipe("tiny", overrides)
    status = Supervisor("pretrain", attempt, task, config, ranks=count, work=work).run()
    write_whole(marks() / f"{rank}.status", str(status))
    os._exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the supervisors
    work = train if sys.argv[1:] == ["train"] else act
    if work is train:
        supervisor._import_all((*supervisor._IMPORTED, *supervisor._IMPORTED_ON_RANK_0))
    for line in sys.stdin:
        asked = json.loads(line)
        if (pid := os.fork()) == 0:
            os.environ |= asked["environment"]
            try:
                supervise(*asked["ranks"], asked.get("settings", ()), work)
            finally:
                os._exit(99)
        print(pid, flush=True)
