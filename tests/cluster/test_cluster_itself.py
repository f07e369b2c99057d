"""The tests' cluster behaves as they expect of SLURM. The jobs are lines of shell, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import ClusterError, SlurmCluster
from tests.cluster.slurm_nodes import until

pytestmark = pytest.mark.alone


@pytest.fixture
def idle(cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster, whose jobs are cancelled after the test."""
    yield cluster
    cluster.command("scancel", "--me", "--signal=KILL")
    cluster.command("scancel", "--me")
    cluster.wait_ready()


def _submit(cluster: SlurmCluster, folder: Path, script: str, *options: str) -> str:
    """Submit a job of whole nodes that appends its output to folder/out."""
    common = ["--exclusive", f"--output={folder / 'out'}", "--open-mode=append"]
    return cluster.submit(*common, *options, f"--wrap={script}")


def _wait_for_line(out: Path, line: str, timeout: float = 20) -> None:
    """Wait until a job, which SLURM calls RUNNING before its script begins, has written a line."""
    until(lambda: out.exists() and line in out.read_text().splitlines(), timeout, f"the line {line!r} in {out}")


def test_all_nodes_are_idle(cluster: SlurmCluster):
    assert cluster.command("sinfo", "-h", "-p", "main", "-o", "%D %T %c %m") == "4 idle 4 4000"


def test_tasks_on_every_node(cluster: SlurmCluster):
    about = "echo $SLURMD_NODENAME $(hostname) $(readlink /proc/self/ns/pid)"
    said = cluster.command("srun", "-N4", "sh", "-c", about).splitlines()
    names, hosts, spaces = zip(*(line.split() for line in said), strict=True)
    assert sorted(names) == cluster.names
    assert cluster.mode == "ports" or names == hosts
    assert cluster.mode == "ports" or len(set(spaces)) == 4  # each node has its own PID namespace


def test_a_job_ends_and_says_so(idle: SlurmCluster, tmp_path: Path):
    job = _submit(idle, tmp_path, "echo done; exit 3", "--job-name=one two")
    assert idle.wait_for(job, "FAILED", timeout=20)["ExitCode"] == "3:0"
    assert idle.job(job)["JobName"] == "one two"
    assert (tmp_path / "out").read_text() == "done\n"


def test_a_preempted_job_is_requeued(idle: SlurmCluster, tmp_path: Path):
    job = _submit(idle, tmp_path, "echo run $SLURM_RESTART_COUNT; sleep 100", "-N4", "--partition=nograce")
    idle.wait_for(job, "RUNNING", timeout=20)
    _wait_for_line(tmp_path / "out", "run")
    preemptor = _submit(idle, tmp_path, "echo high", "-N4", "--partition=high")
    idle.wait_for(job, "PENDING", timeout=20)
    idle.wait_for(preemptor, "COMPLETED", timeout=20)
    assert idle.wait_for(job, "RUNNING", timeout=30)["Restarts"] == "1"
    _wait_for_line(tmp_path / "out", "run 1")
    idle.command("scancel", job)
    idle.wait_for(job, "CANCELLED", timeout=10)
    said = [line for line in (tmp_path / "out").read_text().splitlines() if not line.startswith("slurmstepd")]
    assert said == ["run", "high", "run 1"]


def test_a_node_that_is_down_is_left(idle: SlurmCluster, tmp_path: Path):
    job = _submit(idle, tmp_path, "sleep 100", "-N1")
    node = idle.wait_for(job, "RUNNING", timeout=20)["NodeList"]
    idle.down_node(node)
    idle.wait_for(job, "PENDING", timeout=10)
    other = idle.wait_for(job, "RUNNING", timeout=30)["NodeList"]
    idle.resume_node(node)
    assert other != node


def test_cut_power_and_boot(idle: SlurmCluster, tmp_path: Path):
    job = _submit(idle, tmp_path, "echo run; while sleep 0.1; do date; done", "-N1", "--no-requeue")
    node = idle.wait_for(job, "RUNNING", timeout=20)["NodeList"]
    _wait_for_line(tmp_path / "out", "run")
    idle.cut_power(node)
    size = (tmp_path / "out").stat().st_size
    left = idle.processes(node)
    if idle.mode == "ports":  # the nodes share this machine's uptime, which does not show the reboot
        idle.wait_for(job, "NODE_FAIL", timeout=60)
    idle.boot(node)
    assert left == []
    idle.wait_for(job, "NODE_FAIL", timeout=30)
    assert (tmp_path / "out").stat().st_size == size


def test_jobs_survive_slurmd(idle: SlurmCluster, tmp_path: Path):
    job = _submit(idle, tmp_path, "echo run; sleep 3; echo done", "-N1")
    node = idle.wait_for(job, "RUNNING", timeout=20)["NodeList"]
    _wait_for_line(tmp_path / "out", "run")
    idle.kill_slurmd(node)
    idle.boot(node)
    idle.wait_for(job, "COMPLETED", timeout=20)
    assert (tmp_path / "out").read_text() == "run\ndone\n"


def test_scancel(idle: SlurmCluster, tmp_path: Path):
    job = _submit(idle, tmp_path, "sleep 100")
    idle.wait_for(job, "RUNNING", timeout=20)
    idle.command("scancel", job)
    idle.wait_for(job, "CANCELLED", timeout=10)


def test_a_second_cluster_beside_it(cluster: SlurmCluster):
    with SlurmCluster(nodes=2) as other:
        assert other.command("srun", "-N2", "printenv", "SLURM_CLUSTER_NAME").count("test") == 2
        assert len(other.names) == 2
    assert not other.folder.exists()
    cluster.wait_ready()


def test_what_fails_says_why(cluster: SlurmCluster):
    with pytest.raises(ClusterError, match="Invalid job id"):
        cluster.state("999999")
    with pytest.raises(ClusterError, match=r"slurmctld ended with .*(?s:.*)NoSuchKey"):
        SlurmCluster(nodes=1, extra_conf="NoSuchKey=1").__enter__()
