"""What a sweep hands over to SLURM, which is a stand-in here: jobs, their order, their scripts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from launch.slurm.attempt import record
from launch.slurm.submitted_jobs import submitted
from launch.status import table
from tests.launch.slurm_fakes import Fakes

ACCEPTED = 'case "$*" in *--test-only*) ;; *) echo "Submitted batch job $((100 + count))";; esac'
SWEEP = ("sweep", "tiny", "finetune.lr=1e-4,2e-4,3e-4", "cluster=slurm", "cluster.gpus_per_node=0", "--dir", "s")
POINTS = ("finetune.lr=1e-4", "finetune.lr=2e-4", "finetune.lr=3e-4")


@pytest.fixture
def queue(slurm: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """A cluster on which all goes well."""
    monkeypatch.chdir(tmp_path)
    slurm.answer("sbatch", ACCEPTED)
    slurm.answer("srun", "echo 'spresso: all is there'")
    return slurm


def scripts() -> dict[str, str]:
    """Return the scripts that were handed over by their job ids, first submissions first."""
    found = Path("s/submissions").rglob("*_submission.sh")
    return {path.name.partition("_")[0]: path.read_text() for path in sorted(found)}


def test_shared_stages_are_jobs_and_the_points_one_bounded_array_after_them(queue, capsys):
    assert main([*SWEEP, "--at-once", "2"]) == 0
    told = capsys.readouterr().err
    jobs = dict(re.findall(r"^  (\w+) for 3 points: job (\d+)", told, re.MULTILINE))
    assert list(jobs) == ["synth", "prepare", "pretrain", "autoencode", "quantize"]
    handed = scripts()
    assert f"#SBATCH --dependency=afterok:{jobs['synth']}\n" in handed[jobs["prepare"]]
    assert re.search(rf"--dependency=afterok:.*:{jobs['autoencode']}\n", handed[jobs["quantize"]])
    [array] = re.findall(r"3 points: array (\d+), 2 at once", told)
    assert "#SBATCH --array=0-2%2\n" in handed[array]
    assert f"#SBATCH --dependency=afterany:{':'.join(jobs.values())}\n" in handed[array]
    assert "--requeue" in handed[array]
    for number, point in enumerate(POINTS):
        kept = submitted(Path("s/points") / point)
        assert {stage: item.job for stage, item in kept.items()} == dict.fromkeys(
            ("finetune", "evaluate", "page"), f"{array}_{number}"
        )
        assert (Path(kept["page"].submission) / "config.yaml").is_file()
        assert (Path(kept["page"].submission) / "code/launch/cli.py").is_file()


def test_a_refusal_half_way_leaves_nothing_in_the_queue(queue, capsys):
    tested = 6
    queue.answer("sbatch", "echo 'too many jobs' >&2; exit 1", time=tested + 6)
    assert main([*SWEEP]) == 2
    assert "too many jobs" in capsys.readouterr().err
    assert queue.calls("scancel") == [" ".join(str(100 + tested + number) for number in range(1, 6))]
    assert submitted(Path("s/points") / POINTS[0]) == {}


def test_what_a_check_finds_is_told_and_nothing_is_submitted(queue, capsys):
    queue.answer("sbatch", "echo 'allocation failure: Invalid partition' >&2; exit 1")
    assert main([*SWEEP]) == 2
    assert capsys.readouterr().err.count("Invalid partition") == 6
    assert all("--test-only" in call for call in queue.calls("sbatch"))
    assert list(Path("s/submissions").iterdir()) == []


def test_a_dry_run_shows_the_scripts_and_writes_nothing(queue, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main([*SWEEP, "--dry-run", "--at-once", "1"]) == 0
    told = capsys.readouterr().out
    assert "#SBATCH --array=0-2%1" in told
    assert "# ---- quantize in shared/quantize-" in told
    assert [path for path in tmp_path.rglob("*") if path not in before and "slurm" not in path.parts] == []


def test_what_waits_is_not_submitted_again_and_a_new_point_is(queue, capsys):
    assert main([*SWEEP, "--at-once", "2"]) == 0
    jobs = dict(re.findall(r"^  (\w+) for 3 points: job (\d+)", capsys.readouterr().err, re.MULTILINE))
    [array] = re.findall(r"(\d+)_0", str(submitted(Path("s/points") / POINTS[0])["page"]))[:1]
    lines = [f"{job}|{job}|PENDING||Priority" for job in jobs.values()]
    lines += [f"{array}|{array}_{number}|PENDING||Dependency" for number in range(3)]
    queue.answer("squeue", "\n".join(f"echo '{line}'" for line in lines))
    assert main([*SWEEP]) == 0
    assert "all points are done, or wait or run" in capsys.readouterr().err
    assert main([*SWEEP[:2], "finetune.lr=1e-4,9e-4", *SWEEP[3:]]) == 0
    told = capsys.readouterr().err
    assert "1 points: array" in told
    assert "2 at once" in told  # as before
    newest = list(scripts().values())[-1]
    assert f"#SBATCH --dependency=afterany:{':'.join(jobs.values())}\n" in newest
    assert "#SBATCH --array=0-0%2\n" in newest
    shown = table.report(Path("s"))
    assert "0 of 4 points done, 3 pending" in shown
    assert main(["cancel", "s"]) == 0
    cancelled = " ".join(queue.calls("scancel"))
    assert all(job in cancelled for job in (*jobs.values(), f"{array}_0", f"{array}_2"))


def test_points_whose_jobs_wait_are_not_shown_as_stopped_where_slurm_is_silent(queue):
    assert main([*SWEEP]) == 0
    queue.answer("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    job = submitted(Path("s/points") / POINTS[1])["finetune"].job
    for number, then in ((1, "requeued"), (2, "over")):
        folder = Path("s/points") / POINTS[number] / "finetune"
        entry = {"job": f"{job[:-1]}{number}", "restart": 0}
        record(folder, entry | {"began": 1.0})
        record(folder, entry | {"ended": 2.0, "then": then, "why": "was preempted"})
    shown = table.report(Path("s"))
    assert "0 of 3 points done, 2 pending, 1 failed" in shown
    assert "SLURM does not answer" in shown


@pytest.mark.parametrize("state", ["DEADLINE", "BOOT_FAIL", "LAUNCH_FAILED", "TIMEOUT"])
def test_a_point_that_slurm_has_ended_has_failed(queue, state):
    assert main([*SWEEP]) == 0
    job = submitted(Path("s/points") / POINTS[0])["finetune"].job
    queue.answer("squeue", f"echo '{job.partition('_')[0]}|{job}|{state}||None'")
    [row] = [line for line in table.report(Path("s")).splitlines() if line.startswith(f"  {POINTS[0]}")]
    assert row.split()[2] == "failed"


def test_each_element_runs_the_stages_of_its_own_point(queue, tmp_path):
    """Bash runs the script of the array, with stand-ins for what it calls."""
    folder = tmp_path / "it's a 100% $HOME dir"
    assert main([*SWEEP[:-1], str(folder)]) == 0
    [path] = (folder / "submissions/0001/jobs").glob("*_submission.sh")
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\necho "$SPRESSO_RUN $*" >> '
        + f"{tmp_path}/ran\n"
        + '[ "$4" = evaluate ] && [ "$3" = begin ] && exit 3\nexit 0\n'
    )
    python.chmod(0o755)
    text = path.read_text().replace(
        f"{sys.executable} -m launch.slurm.begin_end", f"{python} -m launch.slurm.begin_end"
    )
    path_ = f"{queue.bin}:/usr/bin:/bin"
    environment = {"PATH": path_, "SLURM_ARRAY_TASK_ID": "1", "HOME": "/wrong"}
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr  # that of `begin evaluate`, after which no stage runs
    ran = (tmp_path / "ran").read_text().splitlines()
    words = "-m launch.slurm.begin_end"
    assert ran == [
        f"{folder}/points/finetune.lr=2e-4 {words} {what}"
        for what in ("begin finetune", "end finetune 0", "begin evaluate")
    ]
    logs = str(folder / "points/finetune.lr=2e-4/finetune/logs").replace("%", "%%")
    assert f"--output={logs}/job_%A_%a_%t.out" in queue.calls("srun")[-1]
