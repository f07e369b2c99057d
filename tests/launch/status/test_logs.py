from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import pytest

from launch.status import logs

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(logs, "_PAUSE", 0.01)
    return tmp_path / "run"


def write(path: Path, text: str, *, age: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def shown(capsys, run: Path, stage: str | None = None, rank: int | None = None) -> str:
    logs.logs(run, stage=stage, rank=rank, follow=False)
    return capsys.readouterr().out


class _Over(Exception):
    """The test has ended."""


class Follower:
    """Reads in a thread, so that a line that does not come fails a test and does not hang it."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines, self.queue = lines, Queue[str]()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        with suppress(_Over):
            for line in self.lines:
                self.queue.put(line)

    def next(self, count: int = 1) -> list[str]:
        return [self.queue.get(timeout=10) for _ in range(count)]


@pytest.fixture
def follow(monkeypatch) -> Iterator[Callable[..., Follower]]:
    """Return a function that follows the logs of a run; its threads end with the test, whose folder may go then."""
    followers: list[Follower] = []
    over = threading.Event()

    def pause(seconds: float) -> None:
        if over.wait(seconds):
            raise _Over

    def start(run: Path, stage: str | None = None, rank: int | None = None) -> Follower:
        files = {path: logs._File(path, at_end=True) for path in logs._all(run, stage, rank)}
        followers.append(Follower(logs.follow_lines(run, stage, rank, files)))
        return followers[-1]

    monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=pause))
    yield start
    over.set()
    for follower in followers:
        follower.thread.join(10)
        assert not follower.thread.is_alive()


def test_the_log_of_a_rank_or_of_the_job_before_there_is_one(run, capsys):
    folder = run / "autoencode" / "logs"
    write(folder / "job_2.out", "module: command not found\n", age=9)
    assert "module: command not found" in shown(capsys, run)
    for rank in (0, 1):
        write(folder / f"rank_{rank}.log", "".join(f"rank {rank} line {number}\n" for number in range(100)))
    told = shown(capsys, run, "autoencode", 1)
    assert told.splitlines()[0] == f"== {folder / 'rank_1.log'}"
    assert "rank 1 line 40\n" in told
    assert "line 39\n" not in told
    assert "module" not in told
    with pytest.raises(ValueError, match="no log of rank 7; it has those of: 0 to 1"):
        logs.logs(run, stage=None, rank=7, follow=False)
    with pytest.raises(ValueError, match=r"no logs of finetune.*autoencode"):
        logs.logs(run, stage="finetune", rank=None, follow=False)
    with pytest.raises(ValueError, match=r"no logs of autoencoder.*autoencode"):
        logs.logs(run, stage="autoencoder", rank=None, follow=True)


def test_what_the_job_has_said_since_is_shown_beside(run, capsys):
    write(run / "autoencode/logs/rank_0.log", "step\n", age=9)
    job = write(run / "autoencode/logs/job_2.out", "spresso: autoencode: requeued: was preempted\n")
    assert shown(capsys, run).splitlines()[2:] == [f"== {job}", "spresso: autoencode: requeued: was preempted"]


def test_a_stage_that_does_not_train_shows_what_its_task_printed(run, capsys):
    write(run / "evaluate/logs/job_16_0.out", "the figures\n", age=9)
    write(run / "evaluate/logs/job_16.out", "spresso: evaluate: done\n")
    told = shown(capsys, run, "evaluate", 0)
    assert told.index("the figures") < told.index("spresso: evaluate: done")


def test_an_array(run, capsys):
    for part in (0, 1):
        write(run / f"prepare/logs/job_9_{part}_0.out", f"files of part {part}\n", age=9 - part)
        write(run / f"prepare/logs/job_9_{part}.out", f"script of part {part}\n", age=5 - part)
    told = shown(capsys, run)
    assert "files of part 1" in told
    assert "script of part 1" in told
    assert "part 0" not in told


def test_one_job_for_all_stages_that_fails_before_any_of_them(run, capsys):
    write(run / "logs/job_30.out", "module: command not found\n")
    (run / "pretrain" / "logs").mkdir(parents=True)
    assert "module: command not found" in shown(capsys, run)
    write(run / "pretrain/logs/job_30_0.out", "a task\n")
    assert shown(capsys, run, rank=0).splitlines()[1] == "a task"


def test_only_the_end_of_a_long_log_is_read(run, capsys):
    path = write(run / "pretrain/logs/rank_0.log", "")
    with path.open("w") as file:
        file.seek(2**31)  # sparse
        file.write("\nthe end\nand no end yet")
    begun = time.monotonic()
    assert shown(capsys, run).splitlines()[1:] == ["the end", "and no end yet"]
    assert time.monotonic() - begun < 0.5


def test_nothing_is_written_yet(run, capsys, follow):
    run.mkdir()
    with pytest.raises(ValueError, match="no logs yet; -f waits for them"):
        logs.logs(run, stage=None, rank=None, follow=False)
    follower = follow(run)
    path = write(run / "pretrain/logs/rank_0.log", "first\n")
    assert follower.next(2) == [f"== {path}", "first"]


def test_it_is_followed_into_the_next_attempt_and_the_next_stage_and_nothing_twice(run, follow):
    first = write(run / "pretrain/logs/rank_0.log", "before\n", age=9)
    follower = follow(run)
    write(first, "one\ntw")
    assert follower.next(2) == [f"== {first}", "one"]
    write(first, "o\n")
    assert follower.next() == ["two"]
    job = write(run / "pretrain/logs/job_1.out", "spresso: pretrain: done\n")
    assert follower.next(2) == [f"== {job}", "spresso: pretrain: done"]
    second = write(run / "autoencode/logs/rank_0.log", "three\n")
    assert follower.next(2) == [f"== {second}", "three"]
    write(job, "late\n")
    write(second, "four\n")
    assert sorted(follower.next(4)) == sorted([f"== {job}", "late", f"== {second}", "four"])


def test_a_rank_that_the_next_stage_does_not_have(run, follow):
    write(run / "autoencode/logs/rank_3.log", "x\n")
    follower = follow(run, rank=3)
    write(run / "quantize/logs/rank_0.log", "not this one\n")
    job = write(run / "quantize/logs/job_3.out", "spresso: quantize: done\n")
    assert follower.next(2) == [f"== {job}", "spresso: quantize: done"]


def test_a_log_that_is_rotated_or_cut(run, follow):
    path = write(run / "autoencode/logs/rank_0.log", "x\n")
    follower = follow(run)
    path.rename(path.with_suffix(".old"))
    write(path, "longer than the one before\nand more\n")
    assert follower.next(3) == [f"== {path}", "longer than the one before", "and more"]
    path.write_text("cut\n")
    assert follower.next() == ["cut"]


def test_a_letter_that_is_written_in_two_halves(run, follow):
    path = write(run / "autoencode/logs/rank_0.log", "x\n")
    follower = follow(run)
    with path.open("ab", buffering=0) as file:
        file.write("é".encode()[:1])
        time.sleep(0.05)
        file.write("é".encode()[1:] + b"\n")
    assert follower.next(2)[1] == "é"


def test_until_ctrl_c(run):
    path = write(run / "pretrain/logs/rank_0.log", "whole\nhal")
    call = f"logs(Path('{run}'), stage=None, rank=None, follow=True)"
    # as from a terminal: a shell has what it starts in the background ignore Ctrl-C
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{heard}; from pathlib import Path; from launch.status.logs import logs; {call}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment) as child:
        timer = threading.Timer(20, child.kill)
        timer.start()
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(2)] == [f"== {path}\n", "whole\n"]
        write(path, "f\n")
        assert child.stdout.readline() == "half\n"
        child.send_signal(signal.SIGINT)
        assert child.wait() == 0
        timer.cancel()
