"""The rows of the dashboard's overview: which runs are found, what is told of each, and how long that may take."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launch.dashboard import overview
from launch.dashboard.found_runs import found_runs
from launch.dashboard.overview import Overview, sparkline
from launch.dashboard.run_details import details
from launch.slurm.scheduler import JobState
from launch.slurm.submitted_jobs import Submitted, keep
from launch.status.queue_watch import QueueWatch
from tests.launch.dashboard.served_runs import add_run, add_sound, train_line


def rows(shown: Overview) -> dict[str, dict]:
    return {row["name"]: row for row in shown.rows(seconds=20)["runs"]}


def test_runs_and_those_of_a_sweep_are_found(tmp_path):
    for name in ("one", "sweep/a", "sweep/b", "deep/er/still", "one/inner"):
        add_run(tmp_path / name)
    (tmp_path / ".hidden" / "pretrain").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "same").symlink_to(tmp_path / "one")
    keep(tmp_path / "waits", [Submitted("pretrain", "1", "", "", 1.0)])
    found, problems = found_runs(tmp_path)
    assert sorted(found) == ["one", "same", "sweep/a", "sweep/b", "waits"]
    assert problems == []


def test_the_points_and_shared_stages_of_a_sweep_are_found(tmp_path):
    for name in ("rates/points/lr=1e-4", "rates/shared/pretrain-0a", "rates/logs/pretrain"):
        add_run(tmp_path / name)
    (tmp_path / "rates/points/lr=1e-4/quantize").symlink_to("../../shared/pretrain-0a/pretrain")
    (tmp_path / "rates/sweep.json").write_text("{}")
    found, problems = found_runs(tmp_path)
    assert sorted(found) == ["rates/points/lr=1e-4", "rates/shared/pretrain-0a"]
    assert problems == []


def test_a_row_tells_where_a_run_is(tmp_path):
    stage = add_run(tmp_path / "mine", stage="pretrain", state="done")
    stage = add_run(tmp_path / "mine")
    with (stage / "metrics.jsonl").open("a") as file:
        file.write(train_line(168, 0.25, mfu=0.41, samples_per_second=12.5))
    add_run(tmp_path / "done", state="done")
    found = rows(Overview(tmp_path))
    mine = found["mine"]
    assert (mine["stage"], mine["state"], mine["samples"], mine["of"]) == ("autoencode", "running?", 160, 8000)
    assert (mine["loss"], mine["mfu"], mine["samples_per_second"]) == (0.25, 0.41, 12.5)
    assert (mine["done"], mine["stages"]) == (1, 2)
    assert mine["expected"]
    assert mine["spark"][0] == 1.0
    assert mine["spark"][-1] == 0.25
    assert found["done"]["state"] == "done"


def test_a_run_that_can_not_be_read_hides_no_other(tmp_path):
    add_run(tmp_path / "good")
    add_run(tmp_path / "bad")
    (tmp_path / "bad" / "jobs.jsonl").write_text("{")
    (tmp_path / "bad" / "autoencode" / "metrics.jsonl").write_text("\0")
    found = rows(Overview(tmp_path))
    assert found["good"]["state"] == "running?"
    assert found["bad"]["state"] == "unreadable"
    assert "jobs.jsonl is damaged" in found["bad"]["problem"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None, "x", True])
def test_a_loss_that_is_no_number(tmp_path, loss):
    stage = add_run(tmp_path / "mine")
    with (stage / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "samples": 168, "time": time.time(), "loss": loss}) + "\n")
    shown = Overview(tmp_path)
    assert json.dumps(shown.rows(seconds=20), allow_nan=False)
    assert json.dumps(details(tmp_path / "mine", shown.stages("mine")), allow_nan=False)


def test_an_answer_has_what_could_be_read_in_time(tmp_path, monkeypatch):
    for number in range(9):
        add_run(tmp_path / f"run{number}", state="done")
    clock = iter(range(1_000_000))
    monkeypatch.setattr(overview.time, "monotonic", lambda: next(clock) / 10)
    shown = Overview(tmp_path)
    missing = [shown.rows(seconds=0.5)["missing"]]
    while missing[-1]:
        missing.append(shown.rows(seconds=0.5)["missing"])
    assert missing == sorted(set(missing), reverse=True)
    assert len(missing) > 1
    assert all(row["state"] == "done" for row in shown.rows(seconds=0.0)["runs"])


def test_the_queue_is_asked_in_the_background(tmp_path):
    add_run(tmp_path / "mine")
    keep(tmp_path / "mine", [Submitted("autoencode", "7", "", "", 1.0)])
    asked = []

    def states(jobs: list[str]) -> dict[str, list[JobState]]:
        asked.append(jobs)
        return {job: [JobState(job, "RUNNING", "n[1-2]")] for job in jobs}

    shown = Overview(tmp_path, QueueWatch(states, patience=20.0))
    assert rows(shown)["mine"]["state"] == "running"
    (stage,) = details(tmp_path / "mine", shown.stages("mine"))["stages"]
    assert (stage["nodes"], stage["job"], stage["state"]) == ("n[1-2]", "7", "running")
    assert asked == [["7"]]


def test_an_answer_is_not_changed_by_a_later_one(tmp_path):
    add_run(tmp_path / "mine")
    keep(tmp_path / "mine", [Submitted("autoencode", "7", "", "", 1.0)])
    nodes = ["n1", "n2"]
    queue = QueueWatch(lambda jobs: {job: [JobState(job, "RUNNING", nodes.pop(0))] for job in jobs}, least=0.0)
    shown = Overview(tmp_path, queue)
    (stage,) = first = shown.stages("mine") if shown.path("mine") else []
    assert [state.nodes for state in stage.living] == ["n1"]
    shown.reader.stages_of(tmp_path / "mine")  # another answer has begun, and has not heard of the queue yet
    assert [state.nodes for state in stage.living] == ["n1"]
    assert first[0].state == "running"


@pytest.mark.parametrize("lines", [0, 1, 2, 39, 40, 41, 400, 9000])
def test_a_sparkline_spans_the_whole_run(tmp_path, lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(train_line(8 * n, float(n), loss_bins=[0.5] * 20) for n in range(1, lines + 1)) + '{"kind": "tr'
    )
    found = sparkline(path)
    assert found == sorted(found)
    assert min(lines, 20) <= len(found) <= 42
    if lines > 1:
        assert found[0] == 1.0
        assert found[-1] == lines


def test_a_sparkline_of_nothing(tmp_path):
    assert sparkline(tmp_path / "none") == []
    (tmp_path / "bad").write_bytes(b"\0" * (1 << 20))
    assert sparkline(tmp_path / "bad") == []


def test_sounds_are_listed_with_the_newest_steps(tmp_path, monkeypatch):
    stage = add_run(tmp_path / "mine")
    add_sound(stage, "clip_1.original.flac", 0)
    for samples in (8, 16, 24):
        add_sound(stage, "clip_1.decoded.flac", samples)
    (stage / "samples" / "step_x").mkdir()
    Path(stage / "samples" / "step_000000000024" / "note.txt").write_text("")
    monkeypatch.setattr("launch.dashboard.run_details._MOST_STEPS", 2)
    clips = details(tmp_path / "mine", Overview(tmp_path).reader.stages_of(tmp_path / "mine"))["clips"]
    assert [(clip["kind"], clip["samples"]) for clip in clips] == [("original", 0), ("decoded", 16), ("decoded", 24)]
