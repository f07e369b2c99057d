"""The walkthrough's commands in order: a bucket, a sweep, two preemptions, an empty disk, one page, MLflow's curves."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from launch import cli
from tests.cluster.runs import spresso
from tests.cluster.slurm_cluster import SlurmCluster
from tests.cluster.slurm_nodes import until
from tests.stores import ENVIRONMENT, S3

pytestmark = [pytest.mark.alone, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "walkthrough.md"
SMALL = (
    *("cluster.nodes=1", "cluster.tasks_per_node=1", "cluster.partition=main", "cluster.mem=1500"),
    *("parallel.threads=1", "parallel.device=cpu", "data.buckets=[]", "log.samples_every=0", "log.every=16"),
    *("pretrain.samples=32", "autoencode.samples=2400", "autoencode.decay=0", "checkpoint.every=160"),
    *("finetune.samples=2400", "finetune.decay=0", "evaluate.decodes=1", "evaluate.curve=0"),
)
"""What makes the walkthrough's commands small, and its trainings long enough to be preempted."""


def told(word: str) -> list[str]:
    """Return the walkthrough's commands `spresso WORD`, made small, as the words after `spresso`."""
    lines = re.findall(rf"^    (spresso {word} .*?)(?:     .*)?$", PAGE.read_text(), re.MULTILINE)
    assert lines
    return [small(line) for line in lines]


def small(line: str) -> str:
    for real, stand_in in (
        ("demo", "tiny"),
        ("cluster=slurm", "cluster=no_accounting"),
        ("s3://sounds", "s3://bucket"),
        ("quantizer.size=64,256", "quantizer.size=8,16"),
    ):
        line = line.replace(real, stand_in)
    words = shlex.split(line)[1:]
    return shlex.join([*words, *SMALL] if words[0] in ("plan", "sweep") else words)


def run(line: str, folder: Path) -> str:
    done = spresso(*shlex.split(line), cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def bucket(cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A bucket with sounds, which the nodes see, in the environment of the user who submits."""
    assert cli.main(["synth", str(tmp_path / "sounds"), "--hours", "0.03"]) == 0
    with S3("0.0.0.0") as server:
        store = fsspec.filesystem(
            "s3",
            endpoint_url=server.url,
            key=ENVIRONMENT["AWS_ACCESS_KEY_ID"],
            secret=ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
            skip_instance_cache=True,
        )
        store.put(f"{tmp_path}/sounds/", f"{server.bucket}/effects/", recursive=True)
        shutil.rmtree(tmp_path / "sounds")
        own = {"AWS_ENDPOINT_URL": f"http://{cluster.address}:{server.port}", "MLFLOW_ALLOW_FILE_STORE": "true"}
        for name, value in {**ENVIRONMENT, **own, "MLFLOW_TRACKING_URI": (tmp_path / "mlflow").as_uri()}.items():
            monkeypatch.setenv(name, value)
        yield server


def curve(stage: Path) -> list[tuple[int, float]]:
    """Return the logged losses of a stage, whole lines only."""
    path = stage / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(entry["samples"], entry["loss"]) for entry in entries if entry["kind"] == "train"]


def reached(folder: Path, stage: str, samples: int) -> bool:
    """Whether a training of this stage in the sweep is under way and has seen so many samples."""
    logs = [curve(path) for path in folder.glob(f"runs/rates/*/*/{stage}") if not path.is_symlink()]
    return any(samples <= log[-1][0] < 2000 for log in logs if log)


def preempt(cluster: SlurmCluster) -> None:
    """Take all nodes for two seconds."""
    nodes = f"--nodes={len(cluster.names)}"
    job = cluster.submit("--partition=high", nodes, "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    cluster.wait_for(job, "COMPLETED", 90)


def of_mlflow(folder: Path) -> dict[str, list[list[tuple[int, float]]]]:
    """Return the training curves that MLflow has, by the name of their run."""
    from mlflow import MlflowClient

    client = MlflowClient((folder / "mlflow").as_uri())
    found: dict[str, list[list[tuple[int, float]]]] = {}
    for each in client.search_runs([client.get_experiment_by_name("spresso").experiment_id], max_results=1000):
        history = client.get_metric_history(each.info.run_id, "train/loss")
        found.setdefault(each.info.run_name, []).append([(point.step, point.value) for point in history])
    return found


def test_from_a_bucket_to_a_page(cluster: SlurmCluster, bucket: S3, tmp_path: Path):
    [plan], [dry, sweep, again] = told("plan"), told("sweep")
    assert sweep == again
    assert dry == sweep.replace("--at-once 2", "--at-once 2 --dry-run")
    assert "s3://bucket/runs/rates takes uploads" in run(plan, tmp_path)
    shown = run(dry, tmp_path)
    assert "#SBATCH --array=0-3%2" in shown
    assert not (tmp_path / "runs").exists()

    # Preempted once while the shared autoencode trains, and once while points finetune.
    run(sweep, tmp_path)
    for stage in ("autoencode", "finetune"):
        until(lambda stage=stage: reached(tmp_path, stage, 400), 600, f"{stage} in the middle")
        preempt(cluster)
    run(*told("status"), tmp_path)

    # An empty disk in the middle of finetuning.
    until(lambda: reached(tmp_path, "finetune", 800), 600, "finetune again")
    run(*told("cancel"), tmp_path)
    cluster.wait_ready(90)
    starts = [path.read_text() for path in tmp_path.glob("runs/rates/*/*/*/attempts/history.jsonl")]
    assert sum(text.count("was preempted") for text in starts) >= 2
    shutil.rmtree(tmp_path / "runs/rates")
    run(again, tmp_path)
    status = told("status")[0]
    until(lambda: "4 of 4 points done" in run(status, tmp_path), 900, "the end of all points")

    # Nothing was trained twice, and nothing is lost.
    stages = [path for path in tmp_path.glob("runs/rates/*/*/*/metrics.jsonl") if not path.parent.is_symlink()]
    places = {f"tiny.{path.parent.parent.name}.{path.parent.name}": path.parent for path in stages}
    curves = {name: curve(path) for name, path in places.items()}
    for name, points in curves.items():
        assert [samples for samples, _ in points] == sorted({samples for samples, _ in points}), name
    logs = [path.read_text() for path in tmp_path.glob("runs/rates/*/*/*/logs/*_0.out")]
    assert any(re.search(r"^fetches step_\d+ of \w+ from s3://", log, re.M) and "resumed from" in log for log in logs)

    # MLflow has the curve of metrics.jsonl, in one run; a stage that had nothing on the store has begun another one.
    tracked = of_mlflow(tmp_path)
    logs_here = {name: path / "logs" / "rank_0.log" for name, path in places.items()}  # none if fetched when done
    anew = {name for name, log in logs_here.items() if log.exists() and "resumed from" not in log.read_text()}
    assert {name for name, runs in tracked.items() if len(runs) > 1} <= anew
    for name, points in curves.items():
        assert points in [sorted(set(run)) for run in tracked[name]], name

    said = run(*told("compare"), tmp_path)
    assert "autoencode.lr" in said
    assert "quantizer.size" in said
    page = (tmp_path / "comparison/index.html").read_text()
    assert page.count("<b>finetune, training loss</b>") == 1
    assert len(list((tmp_path / "comparison/audio").iterdir())) >= 4 * 2
