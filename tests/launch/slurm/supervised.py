"""Runs supervisors whose workers do what a plan says: `python -m tests.launch.slurm.supervised`.

Each line of the standard input asks for a supervisor, which is forked, because importing takes longer than a test. Its
environment has MARKS, a folder, and PLAN: for each generation, what the worker of each rank does, as JSON. Each worker
leaves a file `RANK.GENERATION` with its PID, its attempt's token and its MASTER_PORT, and each supervisor `RANK.status`
with its exit status.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from launch.slurm.attempt import TOKEN, Attempt
from launch.slurm.forked import Tell
from launch.slurm.slurm_task import SlurmTask
from launch.slurm.supervisor import Supervisor
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


def supervise(rank: int, count: int, most: int) -> NoReturn:
    """Be a rank's supervisor."""
    config = load_recipe("tiny", [f"cluster.restarts_in_job={most}", "health.hang_seconds=300"])
    attempt, task = Attempt(Path(os.environ[RUN]) / "pretrain", "12", 0), SlurmTask(rank, count, rank, (count,))
    status = Supervisor("pretrain", attempt, task, config, ranks=count, work=act).run()
    write_whole(marks() / f"{rank}.status", str(status))
    os._exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the supervisors
    for line in sys.stdin:
        asked = json.loads(line)
        if (pid := os.fork()) == 0:
            os.environ |= asked["environment"]
            try:
                supervise(*asked["ranks"])
            finally:
                os._exit(99)
        print(pid, flush=True)
