from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import owner
from launch.slurm import begin_end, scheduler
from launch.slurm.attempt import TOKEN, Attempt, history, record
from launch.slurm.variables import RUN, TASKS_PER_NODE
from models import disk_errors, documents

ROOT = Path(__file__).parents[3]


@pytest.fixture
def start(slurm, tmp_path, monkeypatch):
    """A start of job 12 as its script and tasks see it."""
    slurm.answer("scontrol", 'case "$1" in show) echo localhost;; esac')
    monkeypatch.delenv(TOKEN, raising=False)
    for name, value in {
        **{
            RUN: str(tmp_path / "run"),
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NODELIST": "n[1-2]",
            TASKS_PER_NODE: "1",
        },
        **{"SLURM_JOB_NUM_NODES": "2", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"},
    }.items():
        monkeypatch.setenv(name, value)

    def make(restart: int = 0) -> Attempt:
        if restart:
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        return Attempt(tmp_path / "run" / "pretrain", "12", restart)

    return make


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.slurm.begin_end", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")


def checkpoint(attempt: Attempt, samples: int) -> None:
    (attempt.stage_folder / "checkpoints" / f"step_{samples:012d}").mkdir(parents=True)


def test_a_start_from_its_beginning_to_its_requeue(start, slurm, monkeypatch):
    monkeypatch.setattr(begin_end, "_PAUSE", 0.0)
    attempt = start()
    begun = script("begin", "pretrain")
    assert begun.returncode == 0, begun.stderr
    settings = dict(line.removeprefix("export ").split("=") for line in begun.stdout.splitlines())
    assert settings[TOKEN] == "12_0"
    assert settings["MASTER_ADDR"] == "localhost"
    assert 10_000 <= int(settings["MASTER_PORT"]) < 32_000
    assert owner.holder(attempt.stage_folder).job == "12"
    known = json.loads((attempt.stage_folder.parent / "jobs.jsonl").read_text())
    assert (known["stage"], known["job"]) == ("pretrain", "12")

    checkpoint(attempt, 600)
    for rank in range(2):
        attempt.note(rank, "stopped", why="was preempted")
    slurm.answer("scontrol", "echo 'slurm_update error: try again' >&2; exit 1", time=2)
    assert begin_end._end(attempt, 0) == 0
    assert slurm.calls("scontrol")[1:] == ["requeue 12", "requeue 12"]  # the first of them was refused
    last = history(attempt.stage_folder)[-1]
    assert (last["then"], last["place"], last["why"]) == ("requeued", 600, "was preempted")


def test_it_ends_with_the_status_of_its_outcome(start, slurm):
    attempt = start()
    owner.take(attempt.stage_folder, owner.by_job(attempt))
    attempt.note(0, "done")
    assert script("end", "pretrain", "0").returncode == 0
    assert owner.holder(attempt.stage_folder) is None
    attempt.note(0, "mistake", type="ValueError", message="lower lr")
    ended = script("end", "pretrain", "2")
    assert (ended.returncode, ended.stderr) == (2, "spresso: pretrain: over: lower lr\n")
    assert not [call for call in slurm.calls("scontrol") if call.startswith("requeue")]


def test_who_was_replaced_decides_nothing(start, slurm):
    attempt = start()
    owner.take(attempt.stage_folder, owner.by_job(Attempt(attempt.stage_folder, "12", 1)))
    attempt.note(0, "stopped", why="a signal")
    ended = script("end", "pretrain", "0")
    assert ended.returncode == 0
    assert "has taken over" in ended.stderr
    assert slurm.calls("scontrol") == []


def test_a_start_whose_script_was_killed_is_closed_by_the_next(start, slurm):
    first = start()
    assert script("begin", "pretrain").returncode == 0
    checkpoint(first, 600)
    start(restart=1)
    assert script("begin", "pretrain").returncode == 0
    _, closed, begun = history(first.stage_folder)
    assert (closed["restart"], closed["then"], closed["place"]) == (0, "requeued", 600)
    assert "SLURM requeued the job" in closed["why"]
    assert begun["restart"] == 1


def test_a_living_other_job_is_not_replaced(start, slurm):
    attempt = start()
    owner.take(attempt.stage_folder, owner.by_job(Attempt(attempt.stage_folder, "11", 0)))
    slurm.answer("squeue", "echo '11|11|RUNNING|n1|None'")
    begun = script("begin", "pretrain")
    assert (begun.returncode, begun.stdout) == (2, "")
    assert "in use by job 11, which is alive" in begun.stderr


def test_an_element_of_an_array_is_requeued_by_its_name(start, monkeypatch):
    start()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "20")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    attempt = Attempt.here(Path(os.environ[RUN]) / "prepare")
    assert attempt.token == "20_3_0"
    asked = []
    monkeypatch.setattr(scheduler, "control", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(begin_end, "_PAUSE", 0.0)
    attempt.note(0, "left", why="received SIGTERM")
    assert begin_end._end(attempt, 0) == 0
    assert asked == [("requeue", "20_3")]


def test_a_requeue_that_is_refused_for_good_is_told(start, monkeypatch, capsys):
    attempt = start()
    monkeypatch.setattr(begin_end, "_PERSISTENCE", 0.1)
    monkeypatch.setattr(begin_end, "_PAUSE", 0.05)

    def refused(*arguments: str) -> None:
        raise scheduler.QueueError("not allowed")

    monkeypatch.setattr(scheduler, "control", refused)
    attempt.note(0, "stopped", why="the time limit is near")
    assert begin_end._end(attempt, 0) == 1
    assert "`spresso requeue RUN` submits it again" in capsys.readouterr().err
    assert history(attempt.stage_folder)[-1]["why"] == "could not be requeued: not allowed"


def raised(attempt: Attempt) -> None:
    attempt.note(0, "failed", type="KeyError", message="x")


def lines(attempt: Attempt, *, job: str = "12", place: int | None = 600, count: int = 1, **more: str) -> None:
    entry = {"job": job, "restart": 0, "then": "requeued", "place": place, "failure": "KeyError: x", **more}
    for _ in range(count):
        record(attempt.stage_folder, entry)


@pytest.mark.parametrize(
    ("before", "status", "calls"),
    [
        ({}, 1, 0),  # the same at the same place: it would come again
        ({"job": "11"}, 0, 1),  # another job's
        ({"by": "slurm"}, 0, 1),  # of which it is not known how its ranks ended
        ({"place": 0}, 0, 1),
    ],
)
def test_what_this_job_failed_with_before_is_remembered(start, slurm, monkeypatch, before, status, calls):
    monkeypatch.setattr(begin_end, "_PAUSE", 0.0)
    attempt = start()
    checkpoint(attempt, 600)
    lines(attempt, **before)
    raised(attempt)
    assert begin_end._end(attempt, 1) == status
    assert len([call for call in slurm.calls("scontrol") if call.startswith("requeue")]) == calls


def test_a_stage_that_is_not_trained_is_held_by_nobody(start, slurm):
    folder = start().stage_folder.parent / "prepare"
    assert script("begin", "prepare").returncode == 0
    assert not (folder / "owner.json").exists()


@pytest.mark.parametrize(("stage", "then"), [("evaluate", "over"), ("prepare", "requeued")])
def test_what_begins_anew_each_time_does_not_do_so_for_ever(start, monkeypatch, stage, then):
    monkeypatch.setattr(begin_end, "_PAUSE", 0.0)
    attempt = Attempt(start().stage_folder.parent / stage, "12", 0)
    lines(attempt, place=0 if stage == "evaluate" else None, count=4, failure="")
    attempt.note(0, "left", why="SIGUSR2 came")
    begin_end._end(attempt, 0)
    assert history(attempt.stage_folder)[-1]["then"] == then


def test_ranks_that_left_no_note_are_named(start, monkeypatch):
    monkeypatch.setattr(begin_end, "_PAUSE", 0.0)
    attempt = start()
    attempt.note(0, "failed", type="RuntimeError", message="Connection closed by peer")
    begin_end._end(attempt, 137)
    assert "rank 1 ended without a note" in history(attempt.stage_folder)[-1]["why"]


def unlistable(monkeypatch, number: int) -> None:
    """Let no folder of checkpoints be listed any more."""
    real = Path.iterdir

    def iterdir(self):
        if self.name == "checkpoints":
            raise OSError(number, os.strerror(number), str(self))
        return real(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_checkpoints_that_can_not_be_listed_now_end_no_job(start, slurm, monkeypatch, capsys, number):
    monkeypatch.setattr(begin_end, "_PAUSE", 0.0)
    attempt = start()
    assert script("begin", "pretrain").returncode == 0
    checkpoint(attempt, 600)
    attempt.note(0, "stopped", why="was preempted")
    unlistable(monkeypatch, number)
    assert begin_end._end(attempt, 0) == 0
    assert slurm.calls("scontrol")[-1] == "requeue 12"
    assert "the progress of pretrain can't be read now" in capsys.readouterr().err
    last = history(attempt.stage_folder)[-1]
    assert (last["then"], last["place"]) == ("requeued", None)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_checkpoints_that_may_not_be_listed_end_the_job_with_the_mend(start, slurm, monkeypatch, capsys, number):
    attempt = start()
    assert script("begin", "pretrain").returncode == 0
    checkpoint(attempt, 600)
    attempt.note(0, "stopped", why="was preempted")
    unlistable(monkeypatch, number)
    assert begin_end._end(attempt, 0) == 2
    assert not any("requeue" in call for call in slurm.calls("scontrol"))
    told = capsys.readouterr().err
    assert "checkpoints can't be opened: permission denied: the progress of pretrain can't be read; allow" in told
    assert owner.holder(attempt.stage_folder) is None
    last = history(attempt.stage_folder)[-1]
    assert (last["then"], last["failure"]) == ("over", "mistake")


def test_a_job_that_is_done_is_done_whatever_can_be_listed(start, slurm, monkeypatch):
    attempt = start()
    assert script("begin", "pretrain").returncode == 0
    attempt.note(0, "done")
    unlistable(monkeypatch, errno.EACCES)
    assert begin_end._end(attempt, 0) == 0
    assert history(attempt.stage_folder)[-1]["then"] == "done"


def unreadable(monkeypatch, name: str, number: int, times: int) -> None:
    """Let the first `times` openings of a record fail, of which each is tried once."""
    monkeypatch.setattr(disk_errors, "PAUSES", ())
    real, left = documents.opened, iter(range(times))

    def opened(path: Path):
        if path.name == name and next(left, None) is not None:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(documents, "opened", opened)


@pytest.mark.parametrize("name", ["owner.json", "history.jsonl"])
def test_records_that_can_not_be_read_now_are_read_again(start, slurm, monkeypatch, capsys, name):
    monkeypatch.setattr(begin_end, "_PAUSE", 0.0)
    attempt = start()
    assert script("begin", "pretrain").returncode == 0
    attempt.note(0, "stopped", why="was preempted")
    unreadable(monkeypatch, name, errno.EIO, times=3)
    assert begin_end._end(attempt, 0) == 0
    assert slurm.calls("scontrol")[-1] == "requeue 12"
    assert capsys.readouterr().err.count("retrying") == 3


@pytest.mark.parametrize("name", ["owner.json", "history.jsonl", "jobs.jsonl"])
def test_a_start_reads_the_records_again_too(start, slurm, monkeypatch, capsys, name):
    monkeypatch.setattr(begin_end, "_PAUSE", 0.0)
    start()
    assert script("begin", "pretrain").returncode == 0
    attempt = start(restart=1)
    unreadable(monkeypatch, name, errno.EIO, times=3)
    assert begin_end._begin(attempt) == 0
    told = capsys.readouterr()
    assert told.err.count("retrying") == 3
    assert f"export {TOKEN}=12_1\n" in told.out
    assert owner.holder(attempt.stage_folder).restart == 1
    assert [entry["restart"] for entry in history(attempt.stage_folder) if "began" in entry] == [0, 1]


@pytest.mark.parametrize(("number", "patience"), [(errno.EACCES, 600.0), (errno.EIO, 0.0)])
@pytest.mark.parametrize("name", ["owner.json", "history.jsonl"])
def test_records_that_can_not_be_read_at_all_are_told(start, slurm, monkeypatch, name, number, patience):
    monkeypatch.setattr(begin_end, "_PERSISTENCE", patience)
    attempt = start()
    assert script("begin", "pretrain").returncode == 0
    attempt.note(0, "stopped", why="was preempted")
    unreadable(monkeypatch, name, number, times=1)
    with pytest.raises(OSError, match=name):
        begin_end._end(attempt, 0)
    assert not any("requeue" in call for call in slurm.calls("scontrol"))
