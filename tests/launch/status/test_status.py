from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import owner
from launch.slurm.attempt import record
from launch.slurm.scheduler import elements_of
from launch.slurm.submitted_jobs import Submitted, keep
from launch.status import table
from launch.status.stage_status import last_line, span
from models import documents
from models.atomic_write import write_whole

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run of which pretrain has ended, autoencode runs after it was preempted, and quantize waits for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPRESSO_ATTEMPT", raising=False)
    folder = tmp_path / "runs" / "mine"
    begin(folder / "pretrain", "done", 96, 96)
    begin(folder / "autoencode", "running", 3000, 9000, samples_per_second=50.0, loss=1.25)
    newest = folder / "autoencode" / "checkpoints" / "step_000000002400"
    newest.mkdir(parents=True)
    (newest / "manifest.json").write_text("{}")
    os.utime(newest / "manifest.json", (time.time() - 240, time.time() - 240))
    for stage, job in (("pretrain", "1"), ("autoencode", "2"), ("quantize", "3")):
        keep(folder, [Submitted(stage, job, "", f"{folder}/{stage}/logs/job_%j.out", time.time())])
    started(folder / "pretrain", "1", 0, "n1")
    ended(folder / "pretrain", "1", 0, "done")
    started(folder / "autoencode", "2", 0, "n[1-4]")
    ended(folder / "autoencode", "2", 0, "requeued", "was preempted", place=1200)
    started(folder / "autoencode", "2", 1, "n[1-2]")
    return folder


def begin(folder: Path, state: str, samples: int, of: int, *, at: float | None = None, **values: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(json.dumps({"state": state, "samples": samples, "of": of}))
    lines = [
        {"kind": "train", "samples": samples, "time": at or time.time(), **values},
        {"kind": "held_out", "loss": 3},
    ]
    (folder / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), '{"kind": "tra']))


def started(folder: Path, job: str, restart: int, nodes: str) -> None:
    record(folder, {"began": time.time() - 900, "job": job, "restart": restart, "nodes": nodes})


def ended(folder: Path, job: str, restart: int, then: str, why: str = "", place: int = 96) -> None:
    record(
        folder, {"ended": time.time() - 500, "job": job, "restart": restart, "place": place, "then": then, "why": why}
    )


def queue_says(slurm, *lines: str) -> None:
    slurm.answer("squeue", "\n".join(f"echo '{line}'" for line in lines) or ":")


def row(report: str, stage: str) -> list[str]:
    [line] = [line for line in report.splitlines() if line.startswith(f"  {stage} ")]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def below(report: str, stage: str) -> str:
    """What is told under a stage's row."""
    lines = report.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"  {stage} ")) + 1
    last = next((n for n in range(first, len(lines)) if not lines[n].startswith(" " * 14)), len(lines))
    return " ".join(line.strip() for line in lines[first:last])


def test_where_each_stage_is(run, slurm):
    queue_says(slurm, "2|2|RUNNING|n[1-2]|None", "3|3|PENDING||Dependency")
    told = table.report(None)
    assert told.splitlines()[1] == "runs/mine"
    assert row(told, "pretrain") == ["pretrain", "1", "done", "96 of 96"]
    ready = {time.strftime("%H:%M", time.localtime(time.time() + 120 + late)) for late in (0, 5)}
    *running, end = row(told, "autoencode")
    assert running == ["autoencode", "2", "running", "n[1-2]", "3,000 of 9,000", "50", "1.2500", "4 min ago"]
    assert end.split()[-1] in ready
    assert below(told, "autoencode") == "requeued once: was preempted"
    assert row(told, "quantize") == ["quantize", "3", "pending", "waits for autoencode"]
    assert slurm.calls("squeue")[0].endswith("--jobs=2,3")
    assert len(slurm.calls("squeue")) == 1
    assert not slurm.calls("sacct")  # what its own script has declared over is not asked about
    assert max(map(len, told.splitlines())) <= 120


def unreadable(monkeypatch, name: str) -> None:
    """Let no file of this name be opened any more."""
    real = documents.opened

    def opened(path: Path):
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(documents, "opened", opened)


@pytest.mark.parametrize("name", ["owner.json", "status.json", "metrics.jsonl", "history.jsonl", "jobs.jsonl"])
def test_a_file_that_can_not_be_read_now_hides_no_run(run, slurm, monkeypatch, name):
    begin(run.parent / "other" / "pretrain", "running", 1, 2)
    (run / "autoencode" / "owner.json").write_text("{}")
    queue_says(slurm)
    unreadable(monkeypatch, name)
    told = table.report(None)
    assert "runs/other" in told
    assert name == "metrics.jsonl" or name in told


def test_checkpoints_on_a_disk_that_is_away_hide_no_run(run, slurm):
    queue_says(slurm, "2|2|RUNNING|n1|None")
    newest = run / "autoencode" / "checkpoints"
    newest.rename(run / "elsewhere")
    newest.symlink_to("/not/mounted")
    assert row(table.report(None), "autoencode")[1:3] == ["2", "running"]


def test_a_done_stage_whose_checkpoints_can_not_be_listed_hides_no_run(run, slurm):
    """Its export is gone, so that its checkpoints decide what mends that."""
    begin(run.parent / "other" / "pretrain", "running", 1, 2)
    (run / "pretrain" / "status.json").write_text('{"state": "done", "export": "c0ffee"}')
    (run / "pretrain" / "checkpoints").symlink_to("/not/mounted")
    queue_says(slurm)
    told = table.report(None)
    assert "runs/other" in told.splitlines()
    assert "pretrain/checkpoints is a link to /not/mounted, which is missing" in told.splitlines()[-1]
    assert "which is missing" in table.report(run)


def test_a_folder_that_may_not_be_looked_into_hides_no_run(run, slurm, monkeypatch):
    theirs, real = run.parent / "theirs", os.stat
    theirs.mkdir()

    def stat(path, **options):
        if not isinstance(path, int) and theirs in Path(path).absolute().parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    queue_says(slurm)
    told = table.report(None)
    assert row(told, "pretrain")
    assert "runs/theirs/jobs.jsonl can't be opened: permission denied" in told


@pytest.mark.parametrize(("of", "speed"), [(9 * 10**15, 20.0), (9000, 1e-300)])
def test_an_end_in_the_far_future_is_no_date(run, slurm, of, speed):
    begin(run / "autoencode", "running", 3000, of, samples_per_second=speed, loss=1.25)
    queue_says(slurm, "2|2|RUNNING|n1|None")
    assert row(table.report(None), "autoencode")[-1].endswith("in years")


def test_large_numbers_fit_as_well(run, slurm):
    begin(run / "autoencode", "running", 1_310_400, 20_000_000, samples_per_second=212.34, loss=1.25)
    queue_says(slurm, "2|2|RUNNING|gpu[001-016,020,033-047]|None", "3|3|PENDING||Priority")
    told = table.report(None)
    assert row(told, "autoencode")[3:6] == ["gpu[001-016,0…", "1,310,400 of 20,000,000", "212.3"]
    assert row(told, "quantize")[3:] == ["waits behind others"]
    assert max(map(len, told.splitlines())) <= 120


def test_one_run_with_all_that_became_of_it(run, slurm):
    queue_says(slurm, "2|2|RUNNING|n[1-2]|None")
    told = table.report(table.resolve("mine"))
    assert "pretrain, job 1, n1, from" in told
    assert ": requeued at 1,200 samples: was preempted\n" in told
    assert told.splitlines()[-1].startswith("autoencode, job 2, n[1-2], from")
    assert told.splitlines()[-1].endswith(": running")


def test_a_start_without_an_end_that_is_not_under_way(run, slurm):
    queue_says(slurm, "2|2|CANCELLED||None")
    told = table.report(run)
    assert row(told, "autoencode")[2] == "cancelled"
    assert "ended without a note" in told


def test_a_stage_that_has_failed_says_why_in_full(run, slurm):
    why = "rank 2 on n1: ArithmeticError: one too many; it failed like this at that place before, so it would fail " * 2
    ended(run / "autoencode", "2", 1, "over", why)
    queue_says(slurm, "3|3|PENDING||DependencyNeverSatisfied")
    told = table.report(None)
    assert row(told, "autoencode")[2] == "failed"
    assert below(told, "autoencode") == f"over, after being requeued once: {why.strip()}"
    assert row(told, "quantize")[3:] == ["never: a stage failed"]
    assert max(map(len, told.splitlines())) <= 120


def test_a_start_that_has_not_come_to_a_line_yet_promises_no_end(run, slurm):
    begin(run / "autoencode", "running", 3000, 9000, at=time.time() - 600, samples_per_second=50.0)
    owner.take(run / "autoencode", owner.Owner("2_1", "n1", 1, "", "2", 1))
    queue_says(slurm, "2|2|RUNNING|n1|None")
    assert row(table.report(None), "autoencode")[3:] == ["n1", "3,000 of 9,000", "4 min ago", "starts up"]


def test_a_training_that_has_fallen_silent(run, slurm):
    begin(run / "autoencode", "running", 3000, 9000, at=time.time() - 7200, samples_per_second=50.0)
    queue_says(slurm, "2|2|RUNNING|n1|None")
    assert row(table.report(None), "autoencode")[-1] == "silent for 2 h"


def test_a_job_that_slurm_has_forgotten(run, slurm):
    queue_says(slurm)
    told = table.report(None)
    assert row(told, "autoencode")[2] == "gone"
    assert "SLURM no longer knows the job" in below(told, "autoencode")


def test_an_array(run, slurm, tmp_path):
    (tmp_path / "submission" / "jobs").mkdir(parents=True)
    (tmp_path / "submission" / "jobs" / "9_submission.sh").write_text("#!/bin/bash\n#SBATCH --array=0-15\n")
    keep(run, [Submitted("prepare", "9", str(tmp_path / "submission"), "logs/job_%A_%a.out", time.time())])
    for part, then in (("0", "done"), ("1", "done"), ("2", "over")):  # long forgotten by SLURM
        ended(run / "prepare", f"9_{part}", 0, then, "x")
    started(run / "prepare", "9_4", 0, "n1")
    queue_says(slurm, "9|9_3|COMPLETED|n1|None", "9|9_4|RUNNING|n2|None", "9|9_[5-7,9,...]|PENDING||Resources")
    told = table.report(None)
    assert row(told, "prepare") == ["prepare", "9", "running", "n2", "3 of 16 parts"]
    assert below(told, "prepare") == "parts: 3 done, 1 failed, 11 pending, 1 running"
    queue_says(slurm, "9|9|CANCELLED||None", "9|9_4|CANCELLED||None")
    assert below(table.report(None), "prepare") == "parts: 2 done, 13 cancelled, 1 failed over: x"


def test_an_array_of_which_nothing_is_known_but_what_slurm_says(run, slurm):
    keep(run, [Submitted("prepare", "9", "", "", time.time())])
    queue_says(slurm, "9|9_0|COMPLETED|n1|None", "9|9_[1-15]|PENDING||Resources")
    assert row(table.report(None), "prepare")[2:] == ["pending", "1 of 16 parts", "waits for nodes"]


def test_numbers_of_an_array():
    assert elements_of("12_[0-2,7%4]") == ["0", "1", "2", "7"]
    assert elements_of("12_[0-6:3]") == ["0", "3", "6"]
    assert (elements_of("12_3"), elements_of("12")) == (["3"], [])


def test_one_job_for_all_stages(run, slurm):
    """As `spresso sbatch` makes it: what it has done is done, though it runs."""
    keep(
        run, [Submitted(stage, "30", "", f"{run}/logs/job_30.out", time.time()) for stage in ("pretrain", "autoencode")]
    )
    started(run / "pretrain", "30", 0, "n1")
    ended(run / "pretrain", "30", 0, "done")
    started(run / "autoencode", "30", 0, "n1")
    queue_says(slurm, "30|30|RUNNING|n1|None")
    told = table.report(None)
    assert (row(told, "pretrain")[2], row(told, "autoencode")[2]) == ("done", "running")
    assert table.requeue(run) == "asked to save and return to the queue: 30"
    assert table.cancel(run).startswith("cancelled 30 (pretrain, autoencode)")
    assert slurm.calls("scancel") == ["--signal=USR2 30", "30"]


@pytest.mark.parametrize("there", [True, False])
def test_without_slurm_it_works_from_the_directory(run, slurm, monkeypatch, there):
    slurm.answer("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    if not there:
        monkeypatch.setenv("PATH", "")
    write_whole(run / "autoencode" / "owner.json", json.dumps(owner.Owner("2_1", "n1", 1, "", "2", 1).__dict__))
    told = table.report(None)
    why = "Unable to contact slurm controller" if there else "squeue is not installed here"
    assert f"from the run directories alone: SLURM does not answer: {why}" in told
    assert [row(told, stage)[2] for stage in ("pretrain", "autoencode", "quantize")] == [
        "done",
        "running?",
        "submitted",
    ]
    assert len(slurm.calls("squeue")) == there  # a controller that is down is waited for once
    for path in (run / "autoencode").rglob("*.json*"):
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    assert below(table.report(None), "autoencode").endswith("nothing written for 2 h")


def test_a_run_by_hand(run, slurm, tmp_path):
    folder = tmp_path / "runs" / "by_hand" / "pretrain"
    folder.mkdir(parents=True)
    owner.take(folder, owner.by_hand())
    me = owner.by_hand()
    assert row(table.report(folder.parent), "pretrain")[1:] == [f"pid {me.pid}", "running", me.host, "starts up"]
    begin(folder, "running", 10, 100, at=time.time() + 1, samples_per_second=1.0, loss=2.0)
    assert row(table.report(folder.parent), "pretrain")[4:7] == ["10 of 100", "1", "2.0000"]
    with pytest.raises(ValueError, match="no job that waits or runs; it is trained by process"):
        table.cancel(folder.parent)
    with pytest.raises(ValueError, match="is trained by process"):
        table.requeue(folder.parent)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write_whole(folder / "owner.json", json.dumps(owner.Owner("x", owner.by_hand().host, child.pid, "1").__dict__))
    told = table.report(folder.parent)
    assert row(told, "pretrain")[1:3] == [f"pid {child.pid}", "died"]
    assert f"process {child.pid}" in below(told, "pretrain")
    assert table.requeue(folder.parent) is None
    assert not slurm.calls("squeue")


def test_a_run_by_hand_after_one_on_the_cluster(run, slurm):
    owner.take(run / "quantize", owner.by_hand())
    queue_says(slurm, "3|3|FAILED||None")
    assert row(table.report(None), "quantize")[1:3] == [f"pid {os.getpid()}", "running"]


def test_torn_lines_and_damaged_files(run, slurm, tmp_path):
    queue_says(slurm, "2|2|RUNNING|n1|None")
    with (run / "autoencode" / "attempts" / "history.jsonl").open("a") as file:
        file.write('{"ended": 1, "jo')
    (run / "autoencode" / "owner.json").write_text("{")
    (run / "autoencode" / "status.json").write_text('{"state": "running", "samples": "2400", "of": 4800}')
    begin(tmp_path / "runs" / "other" / "pretrain", "done", 1, 1)
    (tmp_path / "runs" / "other" / "jobs.jsonl").write_text('{"stage": "pre')
    told = table.report(None)
    remarks = " ".join(below(told, "autoencode").split())
    assert "owner.json is damaged" in remarks
    assert "status.json is damaged (`samples`: expected a whole number, got text): remove it, and run" in remarks
    assert "1 damaged line is passed over in" in remarks
    assert row(told, "quantize")
    assert "other/jobs.jsonl is damaged" in told
    with pytest.raises(ValueError, match=r"jobs\.jsonl is damaged"):
        table.cancel(tmp_path / "runs" / "other")


def test_only_the_end_of_a_long_metrics_file_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"kind": "train", "samples": 7, "time": 1.0})
    with path.open("w") as file:
        file.seek(2**31)  # sparse
        file.write(f'\n{line}\n{{"kind": "train", "sam')
    begun = time.monotonic()
    assert last_line(path)["samples"] == 7
    assert time.monotonic() - begun < 0.5


def test_runs_elsewhere_and_unknown_ones(run, tmp_path):
    begin(tmp_path / "out" / "try2" / "pretrain", "done", 1, 1)
    assert table.runs() == [Path("runs/mine")]
    (tmp_path / "out" / "try2" / "config.yaml").touch()
    assert table.runs() == [Path("out/try2"), Path("runs/mine")]
    (tmp_path / "mine").mkdir()  # no run
    assert table.resolve("mine") == run
    with pytest.raises(ValueError, match=r"no run yours.*\(try2, mine\)"):
        table.resolve("yours")
    assert table.report(tmp_path / "mine") == "no run has begun under mine"


def test_nothing_heavy_is_imported_for_it(run):
    program = "import sys; from launch.status import logs, table; table.report(None); print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "False"


def test_those_that_wait_are_cancelled_first(run, slurm):
    keep(run, [Submitted("finetune", "4", "", "", time.time())])
    queue_says(slurm, "2|2|RUNNING|n1|None", "3|3|PENDING||Dependency", "4|4|PENDING||Dependency")
    told = table.cancel(run)
    assert (
        told == "cancelled 4 (finetune), 3 (quantize), 2 (autoencode); training in 2 (autoencode) saves before it ends"
    )
    assert slurm.calls("scancel") == ["--state=PENDING 4 3", "2 3 4"]
    queue_says(slurm, "2|2|CANCELLED||None", "3|3|CANCELLED||None")
    with pytest.raises(ValueError, match="no job that waits or runs"):
        table.cancel(run)


def test_a_running_job_is_told_to_come_back_and_one_that_waits_is_left(run, slurm):
    queue_says(slurm, "2|2|RUNNING|n1|None", "3|3|PENDING||Dependency")
    assert table.requeue(run) == "asked to save and return to the queue: 2"
    assert slurm.calls("scancel") == ["--signal=USR2 2"]
    queue_says(slurm, "3|3|PENDING||Dependency")
    assert table.requeue(run) == "nothing to do, already waiting or ending: 3 (quantize)"
    queue_says(slurm, "2|2|FAILED||None")
    assert table.requeue(run) is None
    assert len(slurm.calls("scancel")) == 1


def test_nothing_is_cancelled_blindly(run, slurm):
    slurm.answer("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ValueError, match="does not answer"):
        table.cancel(run)
    with pytest.raises(ValueError, match="does not answer"):
        table.requeue(run)


def test_ages():
    assert [span(seconds) for seconds in (4, 200, 7200, 300_000)] == ["4 s", "3 min", "2 h", "3 days"]
