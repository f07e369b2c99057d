from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import logs, owner, status
from launch.attempt import record
from launch.jobs import Submitted, keep

ROOT = Path(__file__).parents[2]
NOW = time.time()


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run of which pretrain has ended, autoencode runs, quantize waits for it, and finetune has failed before."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mine"
    begin(folder / "pretrain", "done", 96, 96)
    begin(folder / "autoencode", "running", 3000, 9000, line={"samples_per_second": 50.0, "loss": 1.25})
    newest = folder / "autoencode" / "checkpoints" / "step_000000002400"
    newest.mkdir(parents=True)
    (newest / "manifest.json").write_text("{}")
    os.utime(newest / "manifest.json", (NOW - 240, NOW - 240))
    for number, (stage, job) in enumerate((("pretrain", "1"), ("autoencode", "2"), ("quantize", "3"))):
        keep(folder, [Submitted(stage, job, "", "", NOW + number)])
    who = {"job": "2", "restart": 0}
    record(folder / "autoencode", {**who, "began": NOW - 900, "nodes": "n[1-4]"})
    record(
        folder / "autoencode", {**who, "ended": NOW - 500, "place": 1200, "then": "requeued", "why": "was preempted"}
    )
    return folder


def begin(folder: Path, state: str, samples: int, of: int, line: dict | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps({"state": state, "samples": samples, "of": of}))
    lines = [json.dumps({"kind": "train", "samples": samples, **(line or {})}), '{"kind": "held_out", "loss": 3}']
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "tra']))


def queue_says(slurm, *lines: str) -> None:
    slurm.answer("squeue", "\n".join(f"echo '{line}'" for line in lines))


def row(report: str, stage: str) -> list[str]:
    [line] = [line for line in report.splitlines() if line.split()[1:2] == [stage]]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_where_each_stage_is(run, slurm):
    queue_says(slurm, "2|2|RUNNING|n[1-2]|None", "3|3|PENDING||Dependency")
    told = status.report(None)
    assert row(told, "pretrain")[2:4] == ["1", "done"]
    running = row(told, "autoencode")
    assert running[2:5] == ["2", "running", "n[1-2]"]
    assert running[5:10] == ["3\u202f000", "9\u202f000", "50", "1.2500", "4 min ago"]
    assert running[10] == "2"
    assert running[-1] == "was preempted"
    assert abs(_minutes(running[11]) - _minutes(time.strftime("%H:%M", time.localtime(time.time() + 120)))) <= 1
    assert row(told, "quantize")[2:] == ["3", "pending", "waits for the stage before"]
    assert len(slurm.calls("squeue")) == 1
    assert max(map(len, told.splitlines())) <= 140


def _minutes(clock: str) -> int:
    hours, minutes = clock.split(":")
    return int(hours) * 60 + int(minutes)


def test_one_run_with_all_that_became_of_it(run, slurm):
    queue_says(slurm, "2|2|RUNNING|n[1-2]|None")
    told = status.report(status.resolve("mine"))
    assert "on n[1-4]: requeued at 1200 samples: was preempted" in told


def test_an_array(run, slurm):
    keep(run, [Submitted("prepare", "9", "", "", NOW)])
    (run / "prepare").mkdir()
    queue_says(slurm, "9|9_0|COMPLETED|n1|None", "9|9_1|RUNNING|n2|None", "9|9_[2-3]|PENDING||Resources")
    assert row(status.report(run), "prepare")[3] == "1 completed, 1 pending, 1 running"


def test_without_slurm_it_works_from_the_directory(run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    told = status.report(None)
    assert "SLURM says nothing of the jobs: there is no squeue here" in told
    assert row(told, "pretrain")[3] == "done"


def test_a_run_by_hand(run, slurm, tmp_path):
    folder = tmp_path / "runs" / "by_hand" / "pretrain"
    begin(folder, "running", 10, 100)
    owner.take(folder, owner.by_hand())
    assert "running" in _line(status.report(None), "by_hand")
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (folder / "owner.json").unlink()
    owner.take(folder, owner.Owner("x", owner.by_hand().host, child.pid, "1"))
    assert "died" in _line(status.report(None), "by_hand")
    os.environ.pop("SPRESSO_ATTEMPT", None)


def _line(report: str, run: str) -> str:
    return next(line for line in report.splitlines() if line.startswith(run))


def test_an_unknown_run_names_those_there_are(run):
    with pytest.raises(ValueError, match=r"no run yours.*\(mine\)"):
        status.resolve("yours")


def test_nothing_heavy_is_imported_for_it(run):
    program = "import sys; from launch import status; status.report(None); print('torch' in sys.modules)"
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, capture_output=True, text=True, env=environment).stdout.strip() == "False"


def test_those_that_wait_are_cancelled_first(run, slurm):
    queue_says(slurm, "2|2|RUNNING|n1|None", "3|3|PENDING||Dependency")
    assert status.cancel(run).startswith("cancelled: 3, 2; 2 may take a little")
    assert slurm.calls("scancel") == ["3", "2"]
    queue_says(slurm, "2|2|CANCELLED||None", "3|3|CANCELLED||None")
    with pytest.raises(ValueError, match="is alive"):
        status.cancel(run)


def test_a_running_job_is_told_to_come_back_and_one_that_waits_is_left(run, slurm):
    queue_says(slurm, "2|2|RUNNING|n1|None", "3|3|PENDING||Dependency")
    assert "come back: 2" in status.requeue(run)
    assert slurm.calls("scancel") == ["--signal=USR2 2"]
    queue_says(slurm, "3|3|PENDING||Dependency")
    assert "wait already: 3" in status.requeue(run)
    queue_says(slurm, "2|2|FAILED||None")
    assert status.requeue(run) is None


def test_the_log_of_a_rank_or_of_the_job_before_there_is_one(run, capsys):
    folder = run / "autoencode" / "logs"
    folder.mkdir()
    (folder / "job_2.out").write_text("module: command not found\n")
    logs.logs(run, stage=None, rank=None, follow=False)
    assert "module: command not found" in capsys.readouterr().out
    for rank in (0, 1):
        (folder / f"rank_{rank}.log").write_text("".join(f"rank {rank} line {number}\n" for number in range(100)))
    logs.logs(run, stage="autoencode", rank=1, follow=False)
    shown = capsys.readouterr().out
    assert "rank 1 line 99" in shown
    assert "line 39\n" not in shown
    with pytest.raises(ValueError, match="no log of rank 7; there are: 0 to 1"):
        logs.logs(run, stage=None, rank=7, follow=False)
    with pytest.raises(ValueError, match=r"no logs of finetune.*autoencode"):
        logs.logs(run, stage="finetune", rank=None, follow=False)


def test_a_log_is_followed_into_the_next_stage(run, monkeypatch):
    monkeypatch.setattr(logs, "_PAUSE", 0.01)
    first = run / "pretrain" / "logs" / "rank_0.log"
    first.parent.mkdir()
    first.write_text("before\n")

    def write() -> None:
        with first.open("a") as file:
            for part in ("one\ntw", "o\n"):
                file.write(part)
                file.flush()
                time.sleep(0.1)
        second = run / "autoencode" / "logs" / "rank_0.log"
        second.parent.mkdir()
        second.write_text("three\n")

    threading.Thread(target=write).start()
    lines = logs.followed(run, None, None, first, len("before\n"))
    assert [next(lines) for _ in range(2)] == ["one", "two"]
    assert next(lines).endswith("autoencode/logs/rank_0.log")
    assert next(lines) == "three"
