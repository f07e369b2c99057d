"""Where the schema says text, the text counts, in overrides and in recipes."""

from __future__ import annotations

import pytest
import yaml

from trainer.recipes.reading import load_recipe
from trainer.recipes.text import is_text, may_be_none, quote_text
from trainer.recipes.values import to_yaml

CASTS = ["2024_06_01", "007", "on", "No", "1e3", "12:30", "0x10", "2024-06-01", ".5", "1_000", "true", "=", "<<"]


@pytest.mark.parametrize(
    "name", [*CASTS, "exp #2", "a: b", "[x]", "{x}", "~", "null", "- x", "&x", "*x", "%x", "!x", "x "]
)
def test_a_name_is_what_was_typed(name, tmp_path):
    config = load_recipe("tiny", [f"name={name}"])
    assert (config.name, config.run_dir) == (name, f"runs/{name}")
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(config))
    assert load_recipe(str(resolved), []) == config


@pytest.mark.parametrize("text", CASTS)
def test_text_in_a_recipe_is_what_was_typed(text, tmp_path):
    recipe, name = tmp_path / "mine.yaml", text if text.isidentifier() else "B"
    recipe.write_text(
        f"name: {text}\ndata: {{latents: /x/{text}}}\ntext: {{folder: {text}}}\n"
        f"evaluate:\n  weights: {{dac: {text}, opus: /y}}\n"
        f"cluster:\n  environment: {{A: {text}, {name}: b}}\n  setup: [{text}]\n"
    )
    config = load_recipe(str(recipe), [])
    assert (config.name, config.text.folder, config.evaluate.weights["dac"]) == (text, text, text)
    assert config.cluster.environment == {"A": text, name: "b"}
    assert config.cluster.setup == [text]


def test_tables_of_overrides_hold_text_and_numbers():
    config = load_recipe(
        "tiny", ["cluster.environment={A: on, B: 007}", "cluster.environment.C=1e3", "quantizer.rates=[4]"]
    )
    assert config.cluster.environment == {"A": "on", "B": "007", "C": "1e3"}
    assert config.quantizer.rates == [4]


def test_times_of_jobs_are_no_numbers(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "cluster:\n  time: 12:30\n  stages: {evaluate: {time: 1:00:00, nodes: 2, array: 3}}\n"
        "  options: {begin: 16:00, nice: 0, exclusive: true, gres: null}\n"
    )
    cluster = load_recipe(str(recipe), []).cluster
    assert (cluster.time, cluster.of("evaluate").time, cluster.of("evaluate").array) == ("12:30", "1:00:00", 3)
    assert cluster.options == {"begin": "16:00", "nice": 0, "exclusive": True, "gres": None}


def test_null_is_nothing_where_there_may_be_nothing(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {audio: ~}\ntext: {folder: null}\n")
    config = load_recipe(str(recipe), ["pretrained.folder=null", "cluster.time="])
    assert (config.data.audio, config.text.folder, config.pretrained.folder, config.cluster.time) == (None,) * 4


def test_an_empty_name_is_refused():
    with pytest.raises(ValueError, match=r"^name is empty: give name=…$"):
        load_recipe("tiny", ["name="])


def test_a_file_with_the_name_of_a_number_is_a_choice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "007").write_text("kind: local\npartition: on\n")
    (tmp_path / "mine.yaml").write_text("cluster: 007\n")
    assert load_recipe("mine.yaml", []).cluster.partition == "on"


def test_the_schema_says_what_is_text():
    assert [is_text(key) for key in ("name", "data.audio", "evaluate.codecs.x", "seed", "data", "no.such.key")] == [
        *(True, True, True),
        *(False, False, False),
    ]
    assert (may_be_none("data.audio"), may_be_none("name")) == (True, False)


def test_numbers_and_merged_tables_stay():
    text = "a: &a {name: 007}\nseed: 1_0\npretrain: {<<: {lr: 1e-3}, warmup: 5}\n"
    quoted = quote_text(text)
    assert yaml.safe_load(quoted)["pretrain"] == {"lr": "1e-3", "warmup": 5}
    assert yaml.safe_load(quoted)["seed"] == 10
    assert (
        quote_text("seed: 5\npretrain: {lr: 1e-3}  # a comment\n", key="")
        == "seed: 5\npretrain: {lr: 1e-3}  # a comment\n"
    )
