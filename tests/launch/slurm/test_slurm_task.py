from __future__ import annotations

import os
import socket

import pytest

from launch.rank_count import usable_ranks
from launch.slurm import scheduler, slurm_task
from launch.slurm.slurm_task import SlurmTask, free_port, local_counts
from trainer.recipes.reading import load_recipe

JOINED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def task(monkeypatch):
    def make(rank: int, local_rank: int, node: int, per_node: str, gpus: str = "") -> SlurmTask:
        for name, value in {
            **{"SLURM_PROCID": rank, "SLURM_LOCALID": local_rank, "SLURM_NODEID": node},
            **{"SLURM_STEP_TASKS_PER_NODE": per_node, "CUDA_VISIBLE_DEVICES": gpus},
            **dict.fromkeys(JOINED, ""),
        }.items():
            monkeypatch.setenv(name, str(value))
        return SlurmTask.here()

    return make


def joined(task: SlurmTask, count: int) -> tuple[str, ...]:
    task.join(count)
    return tuple(os.environ[name] for name in JOINED)


def test_counts_of_tasks_as_slurm_writes_them():
    assert local_counts("2(x3),1") == [2, 2, 2, 1]
    assert local_counts("8") == [8]


def test_a_task_as_a_rank(task):
    assert joined(task(5, 1, 2, "2(x2),4"), 8) == ("5", "8", "1", "4")
    assert joined(task(3, 1, 1, "2(x3)"), 6) == ("3", "6", "1", "2")
    # fewer ranks than tasks: the last node has a part of its own
    assert joined(task(4, 0, 1, "4(x2)"), 6) == ("4", "6", "0", "2")


def test_a_gpu_of_its_own_is_the_first(task):
    assert joined(task(3, 3, 0, "4", gpus="2"), 4) == ("3", "4", "0", "4")
    assert joined(task(3, 3, 0, "4", gpus="0,1,2,3"), 4) == ("3", "4", "3", "4")


def config(*overrides: str):
    return load_recipe("tiny", ["pretrain.global_batch=12", *overrides])


@pytest.mark.parametrize(("tasks", "expected"), [(4, (4, 3)), (2, (2, 6)), (3, (3, 4)), (5, (4, 3)), (40, (12, 1))])
def test_as_many_ranks_as_the_batch_divides_among(tasks, expected):
    assert usable_ranks(config(), "pretrain", tasks) == expected


def test_any_number_of_nodes_is_judged_at_once():
    assert usable_ranks(config(), "pretrain", 10**15) == (12, 1)


def test_what_goes_through_a_rank_at_once_is_bounded():
    for micro, tasks, expected in ((3, 2, (2, 3)), (4, 2, (2, 3)), (12, 4, (4, 3))):
        bounded = config()
        bounded.parallel.micro_batch = micro
        assert usable_ranks(bounded, "pretrain", tasks) == expected


def test_groups_of_ranks_stay_whole():
    replicas = ("parallel.strategy=fsdp2", "parallel.replicas=2")
    assert usable_ranks(config(*replicas), "pretrain", 5) == (4, 3)
    with pytest.raises(ValueError, match=r"parallel\.replicas=2"):
        usable_ranks(config(*replicas), "pretrain", 1)


def test_the_port_depends_on_the_start_and_is_free():
    first = free_port("12_0")
    assert first == free_port("12_0") < 32_000
    assert len({free_port(f"12_{restart}") for restart in range(20)}) > 15
    with socket.socket() as taken:
        taken.bind(("", first))
        assert free_port("12_0") != first


def test_ranks_meet_at_what_the_first_node_is_reached_by(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "x[1-2]")
    monkeypatch.setattr(scheduler, "hostnames", lambda nodes: ["localhost", "x2"])
    assert slurm_task.rendezvous("1_0")["MASTER_ADDR"] == "localhost"
    monkeypatch.setattr(scheduler, "hostnames", lambda nodes: ["no-such-host.invalid", "x2"])
    monkeypatch.setattr(scheduler, "address_of", lambda node: "10.0.0.7")
    assert slurm_task.rendezvous("1_0")["MASTER_ADDR"] == "10.0.0.7"


def test_threads_are_the_cores_of_a_task_or_its_share(task, monkeypatch):
    shared = task(0, 0, 0, "2")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert shared.threads == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert shared.threads == 6
