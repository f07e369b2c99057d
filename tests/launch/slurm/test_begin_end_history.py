"""What a job's batch script makes of the starts before, and what it writes down."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from launch import owner
from launch.slurm import begin_end, scheduler, submitted_jobs
from launch.slurm.attempt import TOKEN, Attempt, history, record
from launch.slurm.variables import RUN, TASKS_PER_NODE
from launch.status import table
from launch.status.stage_status import StageStatus


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list[tuple[str, ...]]:
    """What scontrol was asked to do, in the environment of job 12 on two tasks."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(scheduler, "control", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(scheduler, "hostnames", lambda nodes: ["localhost"])
    monkeypatch.setattr(scheduler, "alive", lambda numbers: [])
    monkeypatch.setattr(begin_end, "_PAUSE", 0.0)
    variables = {
        RUN: str(tmp_path),
        TOKEN: "",
        "SLURM_JOB_ID": "12",
        TASKS_PER_NODE: "2",
        "SLURM_JOB_NUM_NODES": "1",
    }
    for name, value in (variables | {"SLURM_JOB_NODELIST": "n1"}).items():
        monkeypatch.setenv(name, value)
    return asked


def start(tmp_path, restart: int = 0, *, stage: str = "pretrain", job: str = "12") -> Attempt:
    return Attempt(tmp_path / stage, job, restart)


def close(attempt: Attempt, **facts) -> None:
    """As the end of a start that was requeued at the beginning."""
    entry = {"job": attempt.job, "restart": attempt.restart, "place": 0, "then": "requeued", "why": "", "failure": ""}
    record(attempt.stage_folder, entry | facts)


def told(status: int, attempt: Attempt, capsys) -> tuple[int, str]:
    return begin_end._end(attempt, status), capsys.readouterr().err


def test_the_same_exception_twice_ends_the_job_and_frees_the_directory(tmp_path, asked, capsys):
    for restart in range(2):
        attempt = start(tmp_path, restart)
        begin_end._begin(attempt)
        attempt.note(1, "failed", type="ArithmeticError", message="one too many")
        status, err = told(1, attempt, capsys)
    assert (status, asked) == (1, [("requeue", "12")])  # 1: no mistake of the user's, which were 2
    assert "over: rank 1 on" in err
    assert "it failed like this at the same place before" in err
    assert [entry["then"] for entry in history(attempt.stage_folder) if "then" in entry] == ["requeued", "over"]
    assert owner.holder(attempt.stage_folder) is None


def test_a_requeued_start_keeps_the_directory(tmp_path, asked):
    begin_end._begin(start(tmp_path))
    start(tmp_path).note(0, "stopped", why="was preempted")
    assert begin_end._end(start(tmp_path), 0) == 0
    assert owner.holder(tmp_path / "pretrain").token == "12_0"


@pytest.mark.parametrize(
    ("job", "by", "then"), [("12", "", "over"), ("12", "slurm", "requeued"), ("11", "", "requeued")]
)
def test_what_slurm_requeued_and_another_job_s_starts_are_no_standstill(tmp_path, asked, job, by, then):
    for restart in range(4):
        close(start(tmp_path, restart, job=job), **({"by": by} if by else {}))
    attempt = start(tmp_path, 4)
    attempt.note(0, "stopped", why="the time limit is near")
    begin_end._end(attempt, 0)
    assert history(attempt.stage_folder)[-1]["then"] == then


def test_a_start_does_not_close_itself(tmp_path, asked):
    for _ in range(2):
        begin_end._begin(start(tmp_path))
    assert not [entry for entry in history(tmp_path / "pretrain") if "then" in entry]


def test_the_generation_that_a_lost_node_ended_is_closed_and_no_other(tmp_path, asked):
    first = start(tmp_path)
    begin_end._begin(first)
    close(first, then="restarted", why="rank 1 was killed by SIGKILL")
    record(first.stage_folder, {"began": time.time(), "job": "12", "restart": 0, "generation": 1})
    begin_end._begin(start(tmp_path, 1))
    [killed, lost] = [entry for entry in history(first.stage_folder) if "then" in entry]
    assert (killed["then"], "generation" in killed) == ("restarted", False)
    assert (lost["then"], lost["generation"]) == ("requeued", 1)
    killed_told, lost_told, *_ = table.starts(StageStatus(first.stage_folder, None))
    assert ": restarted: rank 1 was killed by SIGKILL" in killed_told
    assert ": requeued: SLURM requeued the job" in lost_told


def test_a_start_that_was_closed_is_not_closed_again(tmp_path, asked):
    begin_end._begin(start(tmp_path))
    close(start(tmp_path))
    begin_end._begin(start(tmp_path, 1))
    assert [entry.get("then") for entry in history(tmp_path / "pretrain")] == [None, "requeued", None]


def test_a_job_that_is_known_is_not_added_again(tmp_path, asked):
    known = submitted_jobs.Submitted("pretrain", "12", "/there", "/there/log", 1.0)
    submitted_jobs.keep(tmp_path, [known])
    begin_end._begin(start(tmp_path))
    assert (tmp_path / "jobs.jsonl").read_text().count("\n") == 1
    begin_end._begin(start(tmp_path, job="13"))
    assert submitted_jobs.submitted(tmp_path)["pretrain"].job == "13"


def test_of_an_array_the_whole_is_known_once(tmp_path, asked):
    for element in range(3):
        begin_end._begin(start(tmp_path, stage="prepare", job=f"20_{element}"))
    assert [item.job for item in submitted_jobs.submitted(tmp_path).values()] == ["20"]
    assert (tmp_path / "jobs.jsonl").read_text().count("\n") == 1


def test_what_is_not_trained_is_held_by_nobody(tmp_path, asked):
    for element in ("20_0", "20_1"):
        begin_end._begin(start(tmp_path, stage="prepare", job=element))
    assert owner.holder(tmp_path / "prepare") is None


def test_the_place_of_a_start(tmp_path):
    assert begin_end.place(tmp_path / "pretrain") == 0
    for name in ("step_000000000600", "step_000000001200", ".step_000000009000", "step_000000009000.making"):
        (tmp_path / "pretrain" / "checkpoints" / name).mkdir(parents=True)
    assert begin_end.place(tmp_path / "pretrain") == 1200
    assert [begin_end.place(tmp_path / name) for name in ("synth", "prepare", "evaluate", "page")] == [None, None, 0, 0]
    for number in range(3):
        (tmp_path / f"evaluate/pieces/z-{number % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"evaluate/pieces/z-{number % 2}/{number:05d}.safetensors").touch()
    assert begin_end.place(tmp_path / "evaluate") == 3


def test_the_rank_that_ended_without_a_word_is_named(tmp_path, asked, capsys):
    attempt = start(tmp_path)
    attempt.note(0, "left", why="was asked to end, or another rank died")
    assert "rank 1 ended without a note (status 137 of srun: signal 9)" in told(137, attempt, capsys)[1]


def test_notes_that_come_late_from_other_nodes_are_waited_for(tmp_path, asked):
    attempt = start(tmp_path)
    late = threading.Timer(0.3, lambda: attempt.note(0, "done"))
    late.start()
    assert begin_end._end(attempt, 0) == 0
    late.join()
    assert history(attempt.stage_folder)[-1]["then"] == "done"


def test_where_ranks_have_failed_nothing_is_waited_for(tmp_path, asked):
    began = time.monotonic()
    begin_end._end(start(tmp_path), 137)
    assert time.monotonic() - began < 3


def test_a_requeue_that_is_refused_for_good_is_over(tmp_path, asked, monkeypatch):
    def refused(*arguments: str) -> None:
        raise scheduler.QueueError("not allowed")

    monkeypatch.setattr(scheduler, "control", refused)
    monkeypatch.setattr(begin_end, "_PERSISTENCE", 0.05)
    attempt = start(tmp_path)
    attempt.note(0, "stopped", why="the time limit is near")
    assert begin_end._end(attempt, 0) == 1
    assert [entry["then"] for entry in history(attempt.stage_folder)] == ["requeued", "over"]


def test_an_error_of_the_system_is_one_line(tmp_path, asked, monkeypatch, capsys):
    (tmp_path / "pretrain").write_text("no folder")
    monkeypatch.setattr(sys, "argv", ["batch", "begin", "pretrain"])
    assert begin_end.main() == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1, told[:500]
    assert "exists already" in told


def test_a_torn_line_of_the_history_is_passed_over(tmp_path):
    record(tmp_path, {"job": "12", "restart": 0, "then": "done"})
    with (tmp_path / "attempts" / "history.jsonl").open("a") as file:
        file.write('{"job": "12", "th\n')
    record(tmp_path, {"job": "13", "restart": 0, "then": "done"})
    assert [entry["job"] for entry in history(tmp_path)] == ["12", "13"]
