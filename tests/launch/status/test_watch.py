"""`spresso status --watch`: on a terminal of its own, without one, and when SLURM or a disk is away."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path

import pytest

from launch.cli import main
from launch.slurm.scheduler import JobState, QueueError
from launch.slurm.submitted_jobs import Submitted, keep
from launch.status import watch
from launch.status.kept_stages import KeptStages
from launch.status.queue_watch import ENDED_LEAST, QueueWatch
from launch.status.screen import fitted
from launch.status.stage_status import StageStatus
from launch.status.watch import Look
from models import documents

ROOT = Path(__file__).parents[3]
ENTER, LEAVE = b"\x1b[?1049h\x1b[?25l", b"\x1b[?25h\x1b[?1049l"


def begin(folder: Path, samples: int = 3000, state: str = "running") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps({"state": state, "samples": samples, "of": 9000}))
    line = {"kind": "train", "samples": samples, "time": time.time(), "loss": 1.25, "samples_per_second": 50.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    begin(tmp_path / "runs" / "mine" / "pretrain")
    return tmp_path


class Terminal:
    """A terminal in which a watch runs."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process, self.descriptor, self.said = process, descriptor, b""

    def until(self, pattern: bytes) -> bytes:
        """Read until a pattern has come since the last call; return what has come."""
        begin, patience = len(self.said), time.monotonic() + 30
        while not re.search(pattern, self.said[begin:], re.DOTALL):
            assert time.monotonic() < patience, self.said[begin:]
            if select.select([self.descriptor], [], [], 0.1)[0]:
                try:
                    self.said += os.read(self.descriptor, 65_536)
                except OSError:  # the process has closed the terminal
                    assert re.search(pattern, self.said[begin:], re.DOTALL), self.said[begin:]
        return self.said[begin:]

    def resize(self, rows: int, columns: int) -> None:
        ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process.send_signal(signal.SIGWINCH)  # which a terminal sends to those that it controls


@contextmanager
def terminal(work: Path, *arguments: str, rows: int = 24, columns: int = 100) -> Iterator[Terminal]:
    """A watch in a terminal of a size."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    command = [sys.executable, "-m", "launch.cli", "status", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, cwd=work, env=environment) as process:
        os.close(theirs)
        try:
            yield Terminal(process, ours)
        finally:
            if process.poll() is None:
                process.kill()
            os.close(ours)


def test_the_table_is_redrawn_in_place(work):
    with terminal(work, "--watch", "1") as window:
        first = window.until(rb"updated \d\d:\d\d:\d\d")
        assert first.startswith(ENTER)
        assert b"3,000 of 9,000" in first
        begin(work / "runs" / "mine" / "pretrain", 4000)
        again = window.until(rb"4,000 of 9,000.*updated")
        assert b"\x1b[H" in again
        assert ENTER not in again
        window.process.send_signal(signal.SIGINT)
        window.until(re.escape(LEAVE))
        assert window.process.wait(20) == 0
        assert window.said.endswith(LEAVE)


def test_a_new_size_of_the_window_is_followed_at_once(work):
    for number in range(12):
        begin(work / "runs" / f"run{number:02}" / "pretrain", state="done")
    with terminal(work, "--watch", "3600", rows=40) as window:
        window.until(rb"updated")
        window.resize(8, 30)
        drawn = window.until(rb"\x1b\[H.*updated").split(b"\x1b[H")[-1].decode()
        lines = [line.removeprefix("\x1b[K").rstrip("\r") for line in drawn.split("\n")]
        assert len(lines) == 8
        assert max(map(len, lines)) <= 30
        assert lines[6].startswith("… 21 more lines")
        assert "runs/mine" in lines[1]  # what runs stands above what is done
        window.resize(60, 200)
        assert len(window.until(rb"\x1b\[H.*Ctrl-C ends").split(b"\x1b[H")[-1].split(b"\n")) == 29


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_terminal_is_given_back_on_a_signal(work, number, status):
    with terminal(work, "--watch") as window:
        window.until(rb"every 5 s, SLURM at most every 10 s")
        window.process.send_signal(number)
        window.until(re.escape(LEAVE))
        assert window.process.wait(20) == status


def test_the_terminal_is_given_back_while_the_watch_is_stopped(work):
    with terminal(work, "--watch", "1") as window:
        window.until(rb"updated")
        window.process.send_signal(signal.SIGTSTP)
        window.until(re.escape(LEAVE))
        os.waitpid(window.process.pid, os.WUNTRACED)
        window.process.send_signal(signal.SIGCONT)
        window.until(re.escape(ENTER) + rb".*updated")
        window.process.send_signal(signal.SIGINT)
        assert window.process.wait(20) == 0


def test_a_name_can_not_steer_the_terminal(work):
    begin(work / "runs" / "x\x1b[2Jy" / "pretrain")
    with terminal(work, "--watch") as window:
        assert b"runs/x\\x1b[2Jy" in window.until(rb"updated")


def test_without_a_terminal_a_block_is_printed_at_each_change(work):
    command = [sys.executable, "-m", "launch.cli", "status", "mine", "--watch", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=work, env=environment) as process:
        assert process.stdout
        first = [process.stdout.readline() for _ in range(4)]
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]", first[0])
        assert "3,000 of 9,000" in first[3]
        begin(work / "runs" / "mine" / "pretrain", 4000)
        second = [process.stdout.readline() for _ in range(5)]
        assert second[0] == "\n"
        assert "4,000 of 9,000" in second[4]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert "\x1b" not in "".join([*first, *second, process.stdout.read()])


def test_an_age_alone_is_no_change(monkeypatch, capsys):
    texts = iter(["loss 1  saved 3 s ago", "loss 1  saved 14 s ago", "loss 2  saved 1 min ago", "loss 2 saved 2 h ago"])

    class Ending(Exception):
        pass

    def refresh(look: Look) -> None:
        try:
            look.text = next(texts)
        except StopIteration:
            raise Ending from None

    monkeypatch.setattr(Look, "refresh", refresh)
    with pytest.raises(Ending):
        watch._print_changes(Look(None), 1.0, sleep=lambda seconds: None)
    assert [line for line in capsys.readouterr().out.splitlines() if "loss" in line] == [
        "loss 1  saved 3 s ago", "loss 2  saved 1 min ago",
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", ["0.5", "0", "-1", "1e9", "x"])
def test_a_wrong_interval(wrong, capsys):
    with pytest.raises(SystemExit):
        main(["status", f"--watch={wrong}"])
    assert "at least 1 and at most 86400" in capsys.readouterr().err


# ---- a disk or SLURM that is away


def test_an_error_leaves_the_last_table_with_one_line(work, monkeypatch):
    look = Look(None, queue=QueueWatch(lambda jobs: {}))
    look.refresh()
    before, real = look.text, watch.table.report

    def away(*arguments: object, **options: object) -> str:
        raise OSError(116, "Stale file handle", "runs")

    monkeypatch.setattr(watch.table, "report", away)
    look.refresh()
    assert look.text == before
    assert "\n" not in look.foot(5)
    assert "not newer: " in look.foot(5)
    assert "stale file handle" in look.foot(5)
    monkeypatch.setattr(watch.table, "report", real)
    look.refresh()
    assert "not newer" not in look.foot(5)


def stages(folder: Path, *jobs: str) -> list[StageStatus]:
    return [StageStatus(folder / f"stage{job}", Submitted("pretrain", job, "", "", 1.0)) for job in jobs]


class Queue:
    """A queue that answers when it is told to, and writes down what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.state, self.problem = "RUNNING", ""
        self.now, self.answers = 1000.0, threading.Event()
        self.answers.set()

    def __call__(self, jobs: list[str]) -> dict[str, list[JobState]]:
        self.asked.append(jobs)
        assert self.answers.wait(20)
        if self.problem:
            raise QueueError(self.problem)
        return {job: [JobState(job, self.state)] for job in jobs}

    def watched(self, *, patience: float = 20.0) -> QueueWatch:
        return QueueWatch(self, now=lambda: self.now, patience=patience)


def settled(watched: QueueWatch) -> None:
    """Wait until no query is under way."""
    for thread in threading.enumerate():
        if thread.name == "queue":
            thread.join(20)
    assert not watched._busy


def test_slurm_is_asked_no_oftener_than_it_bears(tmp_path):
    queue = Queue()
    watched = queue.watched()
    for _ in range(50):
        assert watched.fill(found := stages(tmp_path, "1", "2")) == ""
        assert [stage.elements[0].state for stage in found] == ["RUNNING", "RUNNING"]
        queue.now += 1.0
        settled(watched)
    assert queue.asked == [["1", "2"]] * 5


def test_a_job_that_has_ended_is_seldom_asked_about(tmp_path):
    queue = Queue()
    queue.state = "COMPLETED"
    watched = queue.watched()
    for _ in range(60):
        watched.fill(found := stages(tmp_path, "1"))
        assert found[0].elements[0].state == "COMPLETED"
        queue.now += ENDED_LEAST / 50
        settled(watched)
    assert len(queue.asked) == 2


def test_without_jobs_slurm_is_not_asked(tmp_path):
    queue = Queue()
    assert queue.watched().fill([StageStatus(tmp_path, None)]) == ""
    assert queue.asked == []


def test_a_slurm_that_does_not_answer_holds_up_nothing(tmp_path):
    queue = Queue()
    watched = queue.watched(patience=0.0)
    queue.answers.clear()
    for _ in range(5):
        found = stages(tmp_path, "1")
        assert watched.fill(found) == ""
        assert found[0].elements == []
        queue.now += 100
    assert queue.asked == [["1"]]  # never twice at once
    queue.answers.set()
    settled(watched)
    watched.fill(found)
    assert found[0].elements[0].state == "RUNNING"


def test_the_last_answer_stays_beside_the_problem(tmp_path):
    queue = Queue()
    watched = queue.watched()
    watched.fill(stages(tmp_path, "1"))
    queue.problem, queue.now = "squeue --me failed: controller is down", queue.now + 11
    settled(watched)
    watched.fill(found := stages(tmp_path, "1"))
    settled(watched)
    assert watched.fill(found) == "SLURM does not answer: controller is down"
    assert found[0].elements[0].state == "RUNNING"
    queue.problem, queue.now = "", queue.now + 11
    watched.fill(found)
    settled(watched)
    assert watched.fill(found) == ""


# ---- what is read again


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the files that are opened."""
    names: list[str] = []
    real = documents.opened
    from launch.status import stage_status

    def note(path: Path):
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(documents, "opened", note)
    monkeypatch.setattr(stage_status, "opened", note)
    return names


def test_only_what_changed_is_read_again(work, opened):
    begin(work / "runs" / "other" / "pretrain", 1)
    look = Look(None, queue=QueueWatch(lambda jobs: {}))
    look.refresh()
    opened.clear()
    look.refresh()
    assert {"status.json", "metrics.jsonl", "history.jsonl", "jobs.jsonl"}.isdisjoint(opened)
    begin(work / "runs" / "other" / "pretrain", 2)
    look.refresh()
    assert opened.count("status.json") == opened.count("metrics.jsonl") == 1
    assert "2 of 9,000" in look.text


def test_new_stages_jobs_and_removed_ones_are_seen(work):
    kept, run = KeptStages(), work / "runs" / "mine"
    assert [stage.folder.name for stage in kept.stages_of(run)] == ["pretrain"]
    keep(run, [Submitted("autoencode", "7", "", "", 1.0)])
    assert [(stage.folder.name, stage.job and stage.job.job) for stage in kept.stages_of(run)] == [
        ("pretrain", None), ("autoencode", "7"),
    ]  # fmt: skip
    begin(run / "quantize")
    assert [stage.folder.name for stage in kept.stages_of(run)] == ["pretrain", "autoencode", "quantize"]
    for file in (run / "pretrain").iterdir():
        file.unlink()
    assert [stage.folder.name for stage in kept.stages_of(run)] == ["autoencode", "quantize"]


def test_what_could_not_be_read_is_read_again(work, monkeypatch):
    kept, run, real = KeptStages(), work / "runs" / "mine", documents.opened

    def away(path: Path):
        if path.name == "status.json":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(documents, "opened", away)
    (stage,) = kept.stages_of(run)
    assert stage.damaged
    monkeypatch.setattr(documents, "opened", real)
    (stage,) = kept.stages_of(run)
    assert (stage.damaged, stage.status["samples"]) == ([], 3000)


# ---- the window


@pytest.mark.parametrize("rows", range(1, 8))
@pytest.mark.parametrize("columns", [1, 5, 80])
def test_a_window_of_any_size(rows, columns):
    lines = ["a" * 40, "字" * 40, "e\u0301" * 40, "", "last"]
    shown = fitted(lines, "foot", columns=columns, rows=rows)
    assert len(shown) == min(rows, 6)
    assert shown[-1] == "foot"[:columns]
    if rows >= 6:
        assert shown[:3] == [
            lines[0][:columns],
            "字" * (columns // 2) if columns < 80 else lines[1],
            lines[2][: 2 * columns],
        ]
