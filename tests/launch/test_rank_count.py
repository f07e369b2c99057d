"""What `spresso plan` says of a batch that is too small for its ranks."""

from __future__ import annotations

import pytest

from launch.plan import plan
from launch.rank_count import batch_advice, sharding_advice
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config


def recipe(*overrides: str) -> Config:
    return load_recipe("tiny", list(overrides), released=False)


def on_cluster(nodes: int, batch: int, *overrides: str) -> Config:
    here = (f"cluster.nodes={nodes}", "cluster.gpus_per_node=8", f"pretrain.global_batch={batch}")
    return recipe("cluster=slurm", *here, *overrides)


@pytest.mark.parametrize(
    "config",
    [
        recipe("pretrain.global_batch=1"),
        recipe("parallel.processes=2", "pretrain.global_batch=8"),
        on_cluster(4, 128),
        on_cluster(4, 4, "pretrain.samples=0"),
    ],
)
def test_a_batch_that_fits_needs_no_advice(config):
    assert batch_advice(config, "pretrain") == []


def test_ranks_that_stay_idle():
    [line] = batch_advice(on_cluster(3, 112), "pretrain")
    assert line.startswith("8 of 24 GPUs or ranks stay idle")
    assert "set pretrain.global_batch=120, or ask for 16" in line


def test_few_clips_a_rank():
    [line] = batch_advice(on_cluster(8, 64), "pretrain")
    assert "1 clip(s) a step" in line
    assert "set pretrain.global_batch=256 or more" in line
    assert "at most 16 ranks" in line


def test_a_batch_smaller_than_the_ranks():
    idle, few = batch_advice(on_cluster(16, 32), "pretrain")
    assert idle.startswith("96 of 128")
    assert "set pretrain.global_batch=128" in idle
    assert "at most 8 ranks" in few


def test_clips_one_at_a_time():
    [line] = batch_advice(on_cluster(1, 64, "parallel.micro_batch=1"), "pretrain")
    assert "8 clips of a rank go through one at a time" in line
    assert "parallel.micro_batch" in line


def test_fsdp2_on_nodes_may_gather_within_each():
    sharded = "parallel.strategy=fsdp2"
    [line] = sharding_advice(on_cluster(4, 128, sharded), "pretrain")
    assert "parallel.replicas=4" in line
    for config in (
        on_cluster(4, 128),
        on_cluster(1, 64, sharded),
        on_cluster(4, 128, sharded, "parallel.replicas=4"),
        recipe("parallel.processes=2", "pretrain.global_batch=8", sharded),
    ):
        assert sharding_advice(config, "pretrain") == []


def test_the_advice_is_in_the_plan():
    lines = list(plan(on_cluster(8, 64)))
    assert any(line.startswith("  ! each rank has 1 clip(s)") for line in lines)
