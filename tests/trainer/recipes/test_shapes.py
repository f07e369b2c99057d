"""A value of another shape than its key wants is one line that names the key."""

from __future__ import annotations

import random

import pytest
import yaml

from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import recipe_schema
from trainer.recipes.values import flatten

SHAPES = (
    *({}, [], {"a": {"b": 1}}, {"a": [1]}, [[1]], [{"a": 1}], {1: 2}, {"a": None}, [None], {None: 1}),
    *(None, True, "x", 1, -1, float("inf"), float("nan"), {"a": float("nan")}, [float("inf")], "${nope}", "???"),
)
SECTIONS = ("data", "lora", "diffusion", "cluster", "cluster.stages", "cluster.stages.prepare", "pretrain", "sampling")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.mix={a: {b: 1}}", "data.mix.a must be a single value, not a table"),
        ("data.mix=[1]", "data.mix must be a table such as `{a: 1}`, not a list"),
        ("data.buckets=[[1]]", r"data.buckets\[0\] must be a single value, not a list"),
        ("cluster.setup={a: 1}", r"cluster.setup must be a list such as `\[1, 2\]`, not a table"),
        ("cluster.stages={prepare: {array: [1]}}", "cluster.stages.prepare.array must be a single value, not a list"),
        ("data=3", "data must be a table such as `{a: 1}`, not a single value"),
    ],
)
def test_another_shape_is_told_by_its_key(override, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        load_recipe("tiny", [override])


def test_shapes_that_fit_are_taken():
    config = load_recipe(
        "tiny", ["cluster.options={exclusive: true}", "data.buckets=[9]", "cluster.stages={prepare: {}}"]
    )
    assert config.cluster.options == {"exclusive": True}


def try_shapes(path, seeds: range) -> int:
    """Load recipes with a value of a random shape at a random key; return how many were refused."""
    keys, refused = [*flatten(recipe_schema()()), *SECTIONS], 0
    for seed in seeds:
        chance = random.Random(seed)
        key, value = chance.choice(keys), chance.choice(SHAPES)
        recipe = value
        for name in reversed(key.split(".")):
            recipe = {name: recipe}
        path.write_text(yaml.safe_dump(recipe))
        overrides = [
            f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix('...' + chr(10)).strip()}"
        ]
        for how in ((str(path), []), ("tiny", overrides)):
            try:
                load_recipe(*how)
            except ValueError:
                refused += 1
    return refused


def test_a_value_of_any_shape_is_taken_or_refused(tmp_path):
    assert 5 < try_shapes(tmp_path / "recipe.yaml", range(24)) < 48


@pytest.mark.slow
def test_hundreds_of_values_of_any_shape(tmp_path):
    try_shapes(tmp_path / "recipe.yaml", range(24, 1000))
