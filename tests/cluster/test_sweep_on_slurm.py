"""A sweep on SLURM: shared stages as jobs, points as one array of which two run at once, one of them preempted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launch.slurm.attempt import history
from launch.slurm.scheduler import elements_of
from tests.cluster.runs import spresso
from tests.cluster.slurm_cluster import SlurmCluster
from tests.cluster.slurm_nodes import until

pytestmark = pytest.mark.alone
SETTINGS = (
    *("cluster=no_accounting", "cluster.nodes=1", "cluster.tasks_per_node=1", "cluster.partition=main"),
    *("parallel.threads=1", "parallel.device=cpu", "cluster.options.exclusive=true"),
    *("data.synth_hours=0.02", "pretrain.samples=32", "autoencode.samples=32", "finetune.samples=2400"),
    *("finetune.decay=0", "log.samples_every=0", "checkpoint.every=4800", "log.trackers=[]", "quantizer.size=8"),
    *("evaluate.clips=2", "evaluate.page_clips=1", "evaluate.decodes=1", "evaluate.curve=0"),
)
GRID = ("finetune.lr=1e-4,2e-4,3e-4,4e-4",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


def running(cluster: SlurmCluster, array: str) -> list[str]:
    """Return the elements of an array that run."""
    told = cluster.command("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i", f"--jobs={array}")
    return [number for job in told.split() for number in elements_of(job)]


def samples(point: Path) -> int:
    path = point / "finetune" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["samples"] for line in lines if line.endswith("\n")), default=0)


def test_four_points_two_at_once_one_preempted(cluster: SlurmCluster, folder: Path):
    done = spresso("sweep", "tiny", *GRID, *SETTINGS, "--at-once", "2", "--dir", "s", cwd=folder)
    assert done.returncode == 0, done.stderr
    shared = re.findall(r"^  (\w+) for 4 points: job (\d+)", done.stderr, re.MULTILINE)
    assert [stage for stage, _ in shared] == ["synth", "prepare", "pretrain", "autoencode", "quantize"]
    [array] = re.findall(r"4 points: array (\d+), 2 at once", done.stderr)
    waiting = spresso("status", "s", cwd=folder)
    assert waiting.returncode == 0, waiting.stderr
    assert "0 of 4 points done" in waiting.stdout
    assert f"{array}_3" in waiting.stdout

    # the same command submits nothing that waits or runs already
    again = spresso("sweep", "tiny", *GRID, *SETTINGS, "--dir", "s", cwd=folder)
    assert "all points are done, or wait or run" in again.stderr

    # preempt one element in the middle of its training
    points = sorted((folder / "s/points").iterdir())
    until(lambda: samples(points[0]) > 100, 300, "the first point")
    assert set(running(cluster, array)) <= {"0", "1"}
    node = cluster.command("squeue", "--noheader", "--format=%N", f"--jobs={array}_0")
    cluster.submit("--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    most = 0

    def all_ended() -> bool:
        nonlocal most
        most = max(most, len(running(cluster, array)))
        return cluster.command("squeue", "--noheader", f"--jobs={array}", "--states=PENDING,RUNNING,COMPLETING") == ""

    until(all_ended, 600, "the end of all points")
    assert most <= 2
    shown = spresso("status", "s", cwd=folder).stdout
    assert "4 of 4 points done" in shown, shown
    first = [entry for entry in history(points[0] / "finetune") if "then" in entry]
    assert [entry["then"] for entry in first[:2]] == ["requeued", "done"]
    assert (first[0]["why"], first[0]["place"] > 100) == ("was preempted", True)
    for point in points[1:]:
        assert [entry["then"] for entry in history(point / "finetune") if "then" in entry] == ["done"]
    for point in points:
        assert samples(point) == 2400
        assert (point / "page/index.html").is_file()
        assert (point / "quantize").is_symlink()

    over = spresso("sweep", "tiny", *GRID, *SETTINGS, "--dir", "s", cwd=folder)
    assert "all points are done" in over.stderr
    assert cluster.command("squeue", "--noheader", "--states=PENDING,RUNNING") == ""


def test_cancel_and_requeue_work_on_the_whole(cluster: SlurmCluster, folder: Path):
    """Two further points: their shared stages are done, so that the array starts at once."""
    more = ("finetune.lr=5e-4,6e-4", *SETTINGS)
    done = spresso("sweep", "tiny", *more, "--dir", "s", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(\d+) points: array", done.stderr) == ["2"]
    assert " for 2 points: job" not in done.stderr
    point = folder / "s/points/finetune.lr=5e-4"
    until(lambda: samples(point) > 100, 200, "a further point")
    cancelled = spresso("cancel", "s", cwd=folder)
    assert cancelled.returncode == 0, cancelled.stderr
    cluster.wait_ready(60)
    assert "4 of 6 points done" in spresso("status", "s", cwd=folder).stdout
    seen = samples(point)
    requeued = spresso("requeue", "s", cwd=folder)
    assert requeued.returncode == 0, requeued.stderr
    assert "2 points: array" in requeued.stderr
    until(lambda: "6 of 6 points done" in spresso("status", "s", cwd=folder).stdout, 400, "the end")
    assert samples(point) == 2400 > seen
