from __future__ import annotations

import pytest

from trainer.recipes.reading import load_recipe


def test_a_choice_is_a_file_that_recipe_and_overrides_change(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("kind: slurm\nnodes: 3\nstages: {prepare: {array: 5}}\n")
    config = load_recipe("tiny", [f"cluster={mine}", "cluster.stages.prepare.mem=4G"])
    assert (config.cluster.nodes, config.cluster.of("prepare").array, config.cluster.of("prepare").mem) == (
        "3",
        5,
        "4G",
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("cluster: no_accounting\n")
    assert load_recipe(str(recipe), ["cluster.nodes=4"]).cluster.nodes == "4"
    assert load_recipe(str(recipe), ["cluster=slurm"]).cluster.gpus_per_node == 8
    with pytest.raises(ValueError, match=r"no cluster=nowhere.*no_accounting, preemptible"):
        load_recipe("tiny", ["cluster=nowhere"])


def test_nodes_and_ranks():
    cluster = load_recipe("tiny", ["cluster=preemptible"]).cluster
    assert (cluster.least_nodes, cluster.most_nodes, cluster.ranks_per_node) == (2, 8, 8)
    assert cluster.of("evaluate").ranks_per_node == cluster.of("page").ranks_per_node == 1
    assert cluster.of("quantize").nodes == "1"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("kind=pbs", "neither local nor slurm"),
        ("nodes=8-2", "neither a number like 4 nor a range like 2-8"),
        ("nodes=0", "neither a number"),
        ("time=soon", "is not a time limit"),
        ("gpus_per_node=-1", "at least 0"),
        ("grace_seconds=0", "at least 1"),
        ("options.time=60", r"set cluster\.time instead"),
        ("options.ntasks-per-node=4", r"set cluster\.tasks_per_node instead"),
        ("options.no-requeue=true", "remove it: requeueing depends on it"),
        ("options.arr=0-3", r"options\.arr: set cluster\.array instead"),
        ("options.no_req=true", r"options\.no_req: remove it: requeueing depends on it"),
        ("options.partit=high", r"set cluster\.partition instead"),
        ("options.gpus-per-n=2", r"set cluster\.gpus_per_node instead"),
        ("stages.prepaer.array=2", "no such stage; the nearest one is prepare"),
        ("stages.prepare.arry=2", r"unknown key cluster\.stages\.prepare\.arry.*array"),
        ("stages.prepare.array=many", "must be of type int"),
        ("stages.evaluate.nodes=0", r"cluster\.stages\.evaluate\.nodes=0"),
    ],
)
def test_what_is_wrong_is_named_with_its_mend(override, told):
    with pytest.raises(ValueError, match=told):
        load_recipe("tiny", ["cluster=slurm", f"cluster.{override}"])


@pytest.mark.parametrize("option", ["gpus", "gpus-per-task", "mem-per-gpu", "time-min", "nodelist", "exclusive"])
def test_an_option_that_begins_alike_is_allowed(option):
    assert load_recipe("tiny", ["cluster=slurm", f"cluster.options.{option}=1"]).cluster.options == {option: 1}
