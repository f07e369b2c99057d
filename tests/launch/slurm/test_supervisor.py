"""Ranks that die and restart in the job: real supervisors, whose workers do what each test says instead of training."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launch import owner
from launch.slurm.attempt import TOKEN, Attempt, history
from launch.slurm.begin_end import ended
from launch.slurm.requeue_policy import OVER, REQUEUE, judge
from launch.slurm.variables import RUN, SUPERVISORS

ROOT = Path(__file__).parents[3]
DONE = ["done 0"] * 3
ECHO = "failed 1 RuntimeError Connection closed by peer"


class Job:
    """The supervisors of a job's three ranks, each a process."""

    def __init__(self, nursery: subprocess.Popen[str], folder: Path, plan: list[list[str]], *, most: int = 9) -> None:
        self.folder, self.marks = folder / "run" / "pretrain", folder / "marks"
        self.marks.mkdir()
        self.attempt = Attempt(self.folder, "12", 0)
        owner.take(self.folder, owner.by_job(self.attempt))
        with socket.create_server(("", 0)) as free:
            self.port = free.getsockname()[1]
        environment = {
            **{RUN: str(folder / "run"), "MARKS": str(self.marks), "PLAN": json.dumps(plan)},
            **{TOKEN: self.attempt.token, SUPERVISORS: str(self.port), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            **{"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"},
        }
        self.supervisors = list[int]()
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for rank in range(len(plan[0])):
            asked = {"environment": environment, "ranks": [rank, len(plan[0]), most]}
            print(json.dumps(asked), file=nursery.stdin, flush=True)
            self.supervisors.append(int(nursery.stdout.readline()))
            if rank == 0:
                self.worker(0)  # from here on its supervisor listens

    def status(self, rank: int) -> int:
        """Wait until a supervisor has ended, and return its exit status."""
        path = self.marks / f"{rank}.status"
        self.until(path.exists)
        return int(path.read_text())

    def statuses(self) -> list[int]:
        """Wait until all supervisors have ended, and return their exit statuses."""
        return [self.status(rank) for rank in range(len(self.supervisors))]

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a supervisor."""
        os.kill(self.supervisors[rank], number)

    def worker(self, rank: int, generation: int = 0) -> tuple[int, str, str]:
        """Wait until a worker has begun, and return its PID, token and MASTER_PORT."""
        path = self.marks / f"{rank}.{generation}"
        self.until(path.exists)
        return tuple(json.loads(path.read_text()))

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    @property
    def ends(self) -> list[tuple[str, str]]:
        """What became of each generation that was restarted, and why."""
        return [(entry["then"], entry["why"]) for entry in history(self.folder) if "then" in entry]

    def verdict(self) -> Any:
        """What the batch script makes of the job."""
        newest = self.attempt.newest()
        return judge(1, newest.notes(), ended(history(self.folder), "12"), 0, tasks=len(self.supervisors))


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    """The process of which supervisors are forked."""
    words = [sys.executable, "-m", "tests.launch.slurm.supervised"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def start(nursery, tmp_path, monkeypatch) -> Iterator[Callable[..., Job]]:
    monkeypatch.setenv(TOKEN, "")
    jobs = []

    def make(*plan: list[str], **options: Any) -> Job:
        jobs.append(Job(nursery, tmp_path, list(plan), **options))
        return jobs[-1]

    yield make
    for job in jobs:
        for pid in job.supervisors:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_all_begin_anew_after_one_was_killed(start, monkeypatch):
    job = start(["hang", "wait 2.0; wait 0.0; kill", "hang"], DONE)
    assert job.statuses() == [0, 0, 0]
    assert job.ends == [("restarted", "rank 1 was killed by SIGKILL")]
    assert not alive(job.worker(0)[0])
    assert not alive(job.worker(2)[0])
    assert [job.worker(rank, 1)[1] for rank in range(3)] == ["12_0.1"] * 3
    assert len({job.worker(rank, 1)[2] for rank in range(3)} | {"1"}) == 2  # one new port for all
    monkeypatch.setenv(TOKEN, job.worker(1)[1])
    with pytest.raises(owner.Superseded):  # a rank of the first generation that still lives can't write
        owner.require(job.folder)
    monkeypatch.setenv(TOKEN, job.worker(1, 1)[1])
    owner.require(job.folder)
    began = [entry for entry in history(job.folder) if "began" in entry]
    assert [entry["generation"] for entry in began] == [1]


def test_two_that_die_at_once_are_one_restart(start):
    job = start(["hang", "wait 2.0; wait 0.0; kill", "wait 1.0; wait 0.0; kill"], DONE)
    assert job.statuses() == [0, 0, 0]
    assert len(job.ends) == 1


def test_who_dies_while_it_restarts_is_restarted(start):
    job = start(["hang", "kill", "hang"], ["kill", "hang", "hang"], DONE)
    assert job.statuses() == [0, 0, 0]
    assert job.ends == [("restarted", f"rank {rank} was killed by SIGKILL") for rank in (1, 0)]


def test_the_cause_is_told_and_not_its_echo(start):
    # the first supervisor is stopped meanwhile, so that it finds its own worker's end first
    job = start([f"wait go; {ECHO}", "hang", "wait go; failed 1 ArithmeticError one too many"], DONE)
    for rank in range(3):
        job.worker(rank)
    job.signal(0, signal.SIGSTOP)
    (job.marks / "go").touch()
    job.until(lambda: {0, 2} <= job.attempt.notes().keys() and not alive(job.worker(2)[0]))
    job.signal(0, signal.SIGCONT)
    assert job.statuses() == [0, 0, 0]
    [(then, why)] = job.ends
    assert (then, why.partition(": ")[2]) == ("restarted", "ArithmeticError: one too many")


def test_the_same_death_three_times_is_left_to_the_batch_script(start):
    job = start(["hang", "kill", "hang"])
    assert job.statuses() == [0, 128 + signal.SIGKILL, 0]
    assert [then for then, _ in job.ends] == ["restarted"] * 2
    verdict = job.verdict()
    assert verdict.then == OVER
    assert "rank 1 was killed by SIGKILL, 3 consecutive times at the same place" in verdict.why


def test_the_same_exception_comes_back_once(start):
    job = start(["hang", "failed 1 ArithmeticError one too many", "hang"])
    assert job.statuses() == [0, 1, 0]
    assert [then for then, _ in job.ends] == ["restarted"]
    assert job.verdict().then == OVER


def test_after_as_many_restarts_as_are_allowed_the_job_is_requeued(start):
    job = start(["hang", "failed 1 KeyError a", "hang"], ["failed 1 KeyError b", "hang", "hang"], most=1)
    assert job.statuses() == [1, 0, 0]
    assert len(job.ends) == 1
    assert job.verdict().then == REQUEUE


def test_a_user_s_mistake_is_no_reason_to_begin_anew(start):
    job = start([f"wait left; {ECHO}", "mistake 2 ValueError lower lr", "hang"])
    job.worker(2)
    assert job.status(1) == 2
    (job.marks / "left").touch()
    assert job.statuses() == [1, 2, 0]
    assert job.ends == []
    assert (job.verdict().then, job.verdict().why) == (OVER, "lower lr")


def test_a_gpu_that_is_broken_is_left(start):
    job = start(["hang", "failed 1 AcceleratorError CUDA error: uncorrectable ECC error encountered", "hang"])
    assert job.statuses() == [0, 1, 0]
    assert job.ends == []
    assert job.verdict().then == REQUEUE


def test_who_is_asked_to_leave_leaves(start):
    job = start(["term; stopped 0"] * 3)
    for rank in range(3):
        job.worker(rank)
        job.signal(rank, signal.SIGTERM)
    assert job.statuses() == [0, 0, 0]
    assert {note["outcome"] for note in job.attempt.notes().values()} == {"stopped"}


def test_a_death_after_the_notice_to_leave_begins_nothing(start):
    job = start(["term; wait go; kill", "hang", "hang"])
    job.worker(0)
    job.signal(0, signal.SIGTERM)
    (job.marks / "go").touch()
    assert job.status(0) == 128 + signal.SIGKILL
    assert job.ends == []


def test_a_worker_dies_with_its_supervisor_and_the_rest_is_left_to_the_batch_script(start):
    job = start(["wait lost; failed 1 RuntimeError gloo", "hang", "hang"])
    for rank in range(3):
        job.worker(rank)
    job.signal(2, signal.SIGKILL)
    job.until(lambda: not alive(job.worker(2)[0]))
    (job.marks / "lost").touch()
    assert job.status(0) == 1
    assert job.status(1) == 0
    assert job.ends == []


def test_without_the_first_supervisor_each_ends_with_its_worker(start):
    job = start(["hang", "wait lost; kill", "hang"])
    for rank in range(3):
        job.worker(rank)
    job.signal(0, signal.SIGKILL)
    job.until(lambda: not alive(job.worker(0)[0]))
    (job.marks / "lost").touch()
    assert job.status(1) == 128 + signal.SIGKILL


def test_ranks_that_hang_may_leave_their_stacks(start):
    # the watchdogs end the ranks, each without a note; the second one a little later than the first
    job = start(["wait 1.0; exit 1", "wait rank_0_ended; mark stacks; exit 1"], ["done 0", "done 0"])
    job.until(lambda: 0 in job.attempt.notes())
    (job.marks / "rank_0_ended").touch()
    assert job.statuses() == [0, 0]
    assert (job.marks / "stacks").exists()
    assert job.ends == [("restarted", "rank 0 ended with status 1 and no note")]


@pytest.mark.parametrize(
    "words", [b"GET / HTTP/1.1\r\n\r\n", b'{"attempt": "11_0", "rank": 1}\n', b"[" * 70_000, b'{"rank": -1}\n']
)
def test_strangers_are_sent_away(start, words):
    job = start(["hang", "wait go; kill", "hang"], DONE)
    job.worker(1)
    with socket.create_connection(("localhost", job.port), timeout=30) as stranger:
        stranger.sendall(words)
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    (job.marks / "go").touch()
    assert job.statuses() == [0, 0, 0]
    assert len(job.ends) == 1


def test_what_a_worker_needs_is_imported_without_a_thread():
    code = (
        "from launch.slurm.quiet_imports import quiet_imports\n"
        "with quiet_imports(): from launch.slurm import forked, supervisor\n"
        "supervisor._import_all(supervisor._IMPORTED + supervisor._IMPORTED_ON_RANK_0)\n"
        "forked.require_forkable(); import sys; assert 'peft' in sys.modules"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "4"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120, cwd=ROOT)


def test_a_process_with_threads_is_not_forked():
    code = (
        "import threading, time; from launch.slurm import forked\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "try: forked.fork(lambda tell: None, close=[])\n"
        "except RuntimeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.startswith("this process has other threads: python")
