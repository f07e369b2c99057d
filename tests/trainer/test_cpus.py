"""The cores and threads that a process may use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trainer.cpus import let_threads_sleep, usable_cpus, usable_threads


@pytest.fixture(autouse=True)
def six_of_64_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_cores_are_those_that_the_process_may_use():
    assert usable_cpus() == 6
    assert [usable_threads(ranks) for ranks in (1, 2, 4, 8)] == [6, 3, 1, 1]


@pytest.mark.parametrize(("text", "threads"), [("3", 3), ("4,2", 4), ("0", 6), ("many", 6), ("", 6)])
def test_the_number_that_was_asked_for_counts(monkeypatch, text, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert usable_threads(1) == threads


@pytest.mark.parametrize(
    ("own", "spins"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "5"}, "5")],
)
def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(monkeypatch, own, spins):
    monkeypatch.setattr(os, "environ", own.copy())
    let_threads_sleep()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_the_command_says_so_before_it_imports_torch(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    code = """
import os, sys
import launch.cli as cli
cli.main = lambda: print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules) or 0
cli.command()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["10000", "False"]


def test_training_takes_no_more(monkeypatch):
    import torch

    from trainer.ranks.parallel import Parallel
    from trainer.recipes.parallel import ParallelConfig

    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    Parallel(ParallelConfig(device="cpu"))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    Parallel(ParallelConfig(device="cpu"))
    Parallel(ParallelConfig(device="cpu", threads=5))
    assert asked == [6, 2, 5]
