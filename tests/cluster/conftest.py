"""The SLURM cluster of four nodes that the tests here share; a failing test shows the logs of its daemons."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm_cluster import SlurmCluster
from tests.system_packages import SLURM, require

_CLUSTER = pytest.StashKey[SlurmCluster]()


@pytest.fixture(scope="session")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Mount a file system of 12 MiB, before the nodes start, as they would not see it otherwise."""
    folder = tmp_path_factory.mktemp("small_disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True)
    yield folder
    if mounted.returncode == 0:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def cluster(pytestconfig: pytest.Config, small_disk: Path) -> Iterator[SlurmCluster]:
    """Brought up once, and what commands such as sbatch talk to; a test leaves it with idle nodes and no jobs.

    A test that uses it is skipped where there is no SLURM.
    """
    require(*SLURM)
    with SlurmCluster(grace_seconds=12) as cluster, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
            patch.delenv(name)  # the tests may run in a job of another SLURM, whose variables would mislead them
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        pytestconfig.stash[_CLUSTER] = cluster
        yield cluster
        del pytestconfig.stash[_CLUSTER]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    cluster = item.config.stash.get(_CLUSTER, None)
    if report.failed and cluster is not None and "cluster" in getattr(item, "fixturenames", ()):
        report.sections.append(("SLURM", cluster.logs()))
    return report
