"""The paths of logs, in which sbatch and srun replace placeholders."""

from __future__ import annotations

from pathlib import Path

from launch.slurm.job_script import Job
from trainer.recipes.cluster import ClusterConfig


def test_a_percent_sign_in_a_folder_is_no_placeholder():
    run = Path("/runs/50%j 100%")
    job = Job(ClusterConfig(kind="slurm"), ["pretrain"], name="50%j", run=run, submission=run / "submissions/0001")
    assert "#SBATCH --output='/runs/50%%j 100%%/pretrain/logs/job_%j.out'" in job.text.splitlines()
    assert "'--output=/runs/50%%j 100%%/pretrain/logs/job_%j_%t.out'" in job.text
    assert job.log == run / "pretrain/logs/job_%j.out"


def test_a_folder_named_like_a_log_stays():
    run = Path("/runs/a.out")
    job = Job(ClusterConfig(kind="slurm"), ["pretrain"], name="x", run=run, submission=run / "submissions/0001")
    assert "--output=/runs/a.out/pretrain/logs/job_%j_%t.out" in job.text
