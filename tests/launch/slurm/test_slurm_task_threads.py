"""What a rank gets of its node's processor, and of the global batch."""

from __future__ import annotations

import os

import pytest

from launch.rank_count import usable_ranks
from launch.slurm.slurm_task import SlurmTask
from trainer.recipes.reading import load_recipe


@pytest.fixture
def node(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)


@pytest.mark.parametrize(("counts", "threads"), [((1, 2), 4), ((8, 3), 2), ((1, 16), 1)])
def test_the_tasks_of_a_node_share_its_cores(node, counts, threads):
    assert SlurmTask(1, sum(counts), 0, counts).threads == threads


def test_what_slurm_gives_a_task_is_its_own(node, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert SlurmTask(1, 3, 0, (1, 2)).threads == 3


def test_more_tasks_than_clips_in_a_batch():
    assert usable_ranks(load_recipe("tiny", ["pretrain.global_batch=32"]), "pretrain", 40) == (32, 1)
