"""A recipe runs on the cluster by the commands that a user types."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.cluster.runs import Run, spresso
from tests.cluster.slurm_cluster import SlurmCluster
from trainer.recipes.reading import load_recipe

pytestmark = pytest.mark.alone

CONTAINER = """#!/bin/sh
echo "$@" >> {inside}
exec unshare --mount sh -c '
  for name in scontrol sbatch squeue sacct; do mount --bind /bin/false "$(command -v $name)"; done
  PATH={python}:$PATH exec "$@"' sh "$@"
"""
SETTINGS = ("cluster=no_accounting", "parallel.threads=1", "cluster.stages.prepare.array=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="module")
def container(folder: Path) -> Path:
    """Stands in for `apptainer exec IMAGE`: a program in a mount namespace without SLURM's commands.

    Each call adds its words to the file `inside`.
    """
    path = folder / "container"
    path.write_text(CONTAINER.format(inside=folder / "inside", python=Path(sys.executable).parent))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def jobs(cluster: SlurmCluster, folder: Path, container: Path) -> dict[str, str]:
    """Submit a whole recipe, of which one stage runs in a container, and return its job ids by stage."""
    inside = f"cluster.stages.finetune.container={container}"
    done = spresso("run", "tiny", f"run_dir={folder / 'run'}", *SETTINGS, inside, cwd=folder)
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^  (\w+): job (\d+)", done.stderr, re.MULTILINE))


def test_each_stage_is_a_job_after_the_one_before(jobs: dict[str, str], cluster: SlurmCluster, folder: Path):
    assert list(jobs) == load_recipe("tiny", []).stages
    waiting = spresso("status", str(folder / "run"))
    assert waiting.returncode == 0, waiting.stderr
    assert jobs["finetune"] in waiting.stdout
    again = spresso("run", "tiny", f"run_dir={folder / 'run'}", *SETTINGS, cwd=folder)
    assert again.returncode == 2
    assert "has jobs that wait or run" in again.stderr
    cluster.wait_for(jobs["page"], "COMPLETED", timeout=900)
    assert (folder / "run" / "page" / "index.html").exists()
    report = json.loads((folder / "run" / "evaluate" / "evaluation.json").read_text())
    assert report


def test_the_ranks_of_one_stage_alone_run_in_its_container(jobs: dict[str, str], folder: Path):
    inside = (folder / "inside").read_text().splitlines()
    assert inside[-4:] == ["python3 -u -m launch.slurm.job_task finetune"] * 4
    assert [line.split()[2] for line in inside[:-4]] == ["launch.slurm.node_health"] * 2  # the nodes were checked first
    assert (folder / "run" / "finetune" / "export").is_dir()


def test_the_logs_of_a_rank(jobs: dict[str, str], folder: Path):
    shown = spresso("logs", str(folder / "run"), "--stage", "autoencode", "--rank", "0")
    assert "done, exported" in shown.stdout


def test_what_has_ended_is_not_done_again(jobs: dict[str, str], cluster: SlurmCluster, folder: Path):
    """This time plain sbatch submits one script for all stages."""
    made = spresso("sbatch", "tiny", f"run_dir={folder / 'run'}", *SETTINGS, cwd=folder)
    assert made.returncode == 0, made.stderr
    exported = {path: path.stat().st_mtime_ns for path in (folder / "run").glob("*/export/*")}
    (folder / "job.sh").write_text(made.stdout)
    job = cluster.submit(str(folder / "job.sh"))
    cluster.wait_for(job, "COMPLETED", timeout=900)
    assert exported == {path: path.stat().st_mtime_ns for path in (folder / "run").glob("*/export/*")}


def test_editing_the_checkout_changes_no_queued_job(cluster: SlurmCluster, folder: Path):
    submissions = sorted((folder / "run" / "submissions").iterdir())
    assert (submissions[0] / "code" / "launch" / "slurm" / "job_task.py").exists()
    assert "SAFEPATH" in next((submissions[0] / "jobs").glob("*_submission.sh")).read_text()


def test_a_second_one_is_refused_while_the_first_lives(cluster: SlurmCluster, folder: Path, tmp_path: Path):
    run = Run(cluster, tmp_path / "run", folder / "run" / "latents")
    run.submit()
    run.reach(100)
    by_hand = spresso(
        *("train", "tiny", "stage=pretrain", f"run_dir={run.folder}", f"data.latents={folder / 'run' / 'latents'}"),
        *(f"pretrain.{key}={getattr(run.config.pretrain, key)}" for key in ("global_batch", "samples", "decay")),
        f"pretrain.ema_halflife={run.config.pretrain.ema_halflife}",
    )
    assert by_hand.returncode == 2
    assert f"is in use by job {run.job}, which is alive" in by_hand.stderr
    told = spresso("cancel", str(run.folder))
    assert told.returncode == 0, told.stderr
    run.end("CANCELLED")
    requeued = spresso("requeue", str(run.folder))
    assert requeued.returncode == 0, requeued.stderr
    assert "job" in requeued.stderr
    spresso("cancel", str(run.folder))


def test_a_mistake_ends_the_chain(cluster: SlurmCluster, folder: Path, tmp_path: Path):
    run = Run(cluster, tmp_path / "run", folder / "run" / "latents", "health.max_rewinds=0", "pretrain.lr=1e15")
    run.submit()
    after = cluster.submit(f"--dependency=afterok:{run.job}", "--kill-on-invalid-dep=yes", "--wrap=true")
    run.end("FAILED")
    [only] = run.ended()
    assert only["then"] == "over"
    assert "lower pretrain.lr" in only["why"]
    cluster.wait_for(after, "CANCELLED")


def test_before_a_job_costs_anything(cluster: SlurmCluster, folder: Path, tmp_path: Path):
    missing = spresso("train", "tiny", "stage=autoencode", f"run_dir={tmp_path / 'run'}", *SETTINGS)
    assert missing.returncode == 2
    assert "run pretrain first" in missing.stderr or "latents" in missing.stderr
    refused = spresso("run", "tiny", f"run_dir={tmp_path / 'run'}", *SETTINGS, "cluster.partition=nowhere")
    assert refused.returncode == 2
    assert "sbatch refuses the job of synth" in refused.stderr
    assert cluster.command("squeue", "--noheader") == ""
