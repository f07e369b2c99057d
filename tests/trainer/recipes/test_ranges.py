"""Every number of a recipe has a range, which is checked at once and shown."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from launch.plan import plan
from models.diffusion import FORMULATIONS, make_diffusion
from models.ranges import Range, range_of
from trainer.recipes.ranges import all_ranges
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import recipe_schema
from trainer.stages import trained_stages


def _holds_numbers(hint: Any) -> bool:
    inner = typing.get_args(hint)
    return hint in (int, float) or any(_holds_numbers(part) for part in inner)


def _numbers(kind: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield each field that holds numbers, with its dotted key; those of cluster.stages are the cluster's own."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _numbers(hints[item.name], f"{prefix}{item.name}.")
        elif _holds_numbers(hints[item.name]):
            yield prefix + item.name, item


def test_every_number_of_a_recipe_has_a_range():
    numbers = dict(_numbers(recipe_schema()))
    assert len(numbers) > 100
    assert {"seed", "pretrain.betas", "data.mix", "dit.text_width", "data.cache.gib"} <= set(numbers)
    assert [key for key, item in numbers.items() if range_of(item) is None] == []
    assert set(numbers) == set(all_ranges())


def test_every_number_of_a_formulation_has_a_range():
    for kind in FORMULATIONS.values():
        assert [key for key, item in _numbers(kind) if range_of(item) is None] == []


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_takes_what_is_not_finite(value):
    keys = [key for key, item in _numbers(recipe_schema()) if "float" in str(item.type) and "[" not in str(item.type)]
    with pytest.raises(ValueError, match="must be") as error:
        load_recipe("tiny", [f"{key}=.{value}".replace(".-", "-.") for key in keys])
    refused = {line.partition("=")[0] for line in str(error.value).splitlines()}
    unlimited = {key for key in keys if all_ranges()[key].unlimited and value == "inf"}
    assert refused == set(keys) - unlimited


@pytest.mark.parametrize("value", [1e16, 1e300, -1e300])
def test_no_number_is_so_large_that_computing_with_it_fails(value):
    keys = [key for key, item in _numbers(recipe_schema()) if "float" in str(item.type) and "[" not in str(item.type)]
    with pytest.raises(ValueError, match="must be") as error:
        load_recipe("tiny", [f"{key}={value}" for key in keys])
    refused = {line.partition("=")[0] for line in str(error.value).splitlines()}
    unlimited = {key for key in keys if all_ranges()[key].unlimited and value > 0}
    assert refused == set(keys) - unlimited


@pytest.mark.parametrize(
    "override",
    [
        "data.clip_seconds=86401",
        "data.window_mib=1e12",
        "data.shard_mb=1e12",
        "evaluate.seconds=1e-9",
        "evaluate.seconds=86401",
        "log.bins=1001",
        "parallel.threads=1000000000000",
        "lora.rank=4611686018427387904",
        "quantizer.books=4611686018427387904",
        "quantizer.size=4611686018427387904",
        "quantizer.vectors=9000000000000000000",
        "quantizer.gain_db=101",
        "text.layer=-999999999",
        "dit.rotary_base=1e-300",
        "diffusion.options={logit_mean: 1e300}",
    ],
)
def test_numbers_that_nobody_can_mean_are_refused_by_their_key(override):
    with pytest.raises(ValueError, match=rf"^{override.partition('=')[0]}(: logit_mean)?=\S+ must be") as error:
        load_recipe("tiny", [override])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("override", ["sampling.steps=100001", "finetune.crop_frames=16777217"])
def test_a_recipe_refuses_what_no_export_can_hold(override):
    with pytest.raises(ValueError, match=rf"^{override} must be at least 1 and at most 1"):
        load_recipe("tiny", [override])


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["clip_norm=0"], ["clip_norm=0.0 must be above 0; null turns clipping off; .inf: no limit"]),
        (["clip_norm=-1"], ["clip_norm=-1.0 must be above 0; null turns clipping off; .inf: no limit"]),
        (["decay=-1", "warmup=-5"], ["warmup=-5 must be at least 0", "decay=-1.0 must be at least 0 and at most 1"]),
        (["decay=2"], ["decay=2.0 must be at least 0 and at most 1"]),
        (["ema_halflife=-1"], ["ema_halflife=-1.0 must be at least 0; 0 turns averaging off"]),
        (["lr=nan"], ["lr=nan must be a finite number"]),
        (["lr=-1e-4"], ["lr=-0.0001 must be at least 0"]),
        (["weight_decay=-1"], ["weight_decay=-1.0 must be at least 0"]),
        (["betas=[0.9,1]"], ["betas[1]=1.0 must be at least 0 and below 1"]),
        (["loss_weights={flow: -1}"], ["loss_weights: flow=-1.0 must be at least 0"]),
        (["lr=1e16"], ["lr=1e+16 must be between -1e15 and 1e15 and at least 0"]),
        (["samples=9223372036854775808"], ["samples=9223372036854775808 must be below 2^63 and at least 0"]),
    ],
)
def test_settings_of_every_stage_are_refused_at_once(overrides, lines):
    for stage in trained_stages():
        with pytest.raises(ValueError, match="must be") as error:
            load_recipe("tiny", [f"{stage}.{override}" for override in overrides])
        assert str(error.value).splitlines() == [f"{stage}.{line}" for line in lines]


def test_all_that_is_out_of_range_is_told_together():
    settings = ["seed=-1", "parallel.micro_batch=-1", "lora.alpha=.nan", "dit.width=-3", "cluster.array=0"]
    with pytest.raises(ValueError, match="must be") as error:
        load_recipe("tiny", [*settings, "quantizer.kind=magic"])
    keys = [line.partition("=")[0] for line in str(error.value).splitlines()]
    assert keys == ["quantizer.kind", "seed", "dit.width", "lora.alpha", "parallel.micro_batch", "cluster.array"]


def test_sizes_that_do_not_fit_are_told_with_all_else():
    with pytest.raises(ValueError, match="take a multiple") as error:
        load_recipe("tiny", ["dit.width=7", "dit.time_features=3", "data.audio=/nowhere"])
    first, second, third = str(error.value).splitlines()
    assert first == "dit: width 7 does not split into 2 heads: take a multiple of 4"
    assert second.startswith("dit: time_features is 3")
    assert third.startswith("data.audio=/nowhere")


def test_a_stage_of_the_cluster_has_the_clusters_ranges():
    with pytest.raises(ValueError, match=r"^cluster\.stages\.prepare\.array=0 must be at least 1$"):
        load_recipe("tiny", ["cluster.stages={prepare: {array: 0}}"])


def test_the_largest_seed_is_below_two_to_the_64():
    assert load_recipe("tiny", [f"seed={2**64 - 1}"]).seed == 2**64 - 1
    with pytest.raises(ValueError, match=r"^seed=18446744073709551616 must be at least 0 and at most 184467"):
        load_recipe("tiny", [f"seed={2**64}"])


def test_options_of_a_formulation_are_refused_together():
    with pytest.raises(
        ValueError, match=r"^edm: log_mean=nan must be a finite number; edm: log_std=-1 must be above 0$"
    ):
        make_diffusion("edm", log_std=-1, log_mean=float("nan"))
    with pytest.raises(ValueError, match=r"^diffusion: edm: rho=-1\.0 must be above 0"):
        load_recipe("tiny", ["diffusion.name=edm", "diffusion.options.rho=-1"])


def test_null_turns_clipping_off():
    assert load_recipe("tiny", ["pretrain.clip_norm=null"]).pretrain.clip_norm is None


def test_plan_shows_each_range_and_its_settings_can_still_be_read():
    text = "\n".join(plan(load_recipe("tiny", ["data.buckets=[36, 45]", "name='lr: 5'"])))
    for line in ("seed: 0  # at least 0", "  clip_norm: 1.0  # above 0; null turns clipping off", "  buckets:  # at"):
        assert line in text
    settings = text.partition("# stages")[0]
    assert settings.count("  # ") == len(all_ranges())
    assert yaml.safe_load(settings)["data"]["buckets"] == [36, 45]


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(above=0), [1e-9, 5], [0, -1, float("nan"), float("inf")]),
        (Range(least=0, below=1), [0, 0.5], [1, -0.1]),
        (Range(least=1, most=3), [1, 3], [0, 4]),
        (Range(), [-5, 0.0, 2**63 - 1], [float("nan"), 2**63, -(2**63) - 1]),
        (Range(), [-1e15, 1e15], [-1e16, 1e16]),
        (Range(above=0, unlimited=True), [1e300, float("inf")], [-1e300]),
    ],
)
def test_a_range_holds_its_numbers(allowed, inside, outside):
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)


def test_the_schema_needs_no_torch():
    code = "import sys, trainer.recipes.schema, trainer.recipes.ranges; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
