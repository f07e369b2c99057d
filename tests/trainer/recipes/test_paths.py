"""Paths in recipes and overrides: `~`, and names that YAML would read as something else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.cli import parser
from trainer.recipes.paths import PATHS, expanded
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.recipes.values import flatten


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "home"
    for name in ("sounds", "Pack #2", "2024", "a: b", "[x]", "set/train"):
        (folder / name).mkdir(parents=True)
    (folder / "cluster.yaml").write_text("kind: local\n")
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_every_path_is_a_key_of_a_recipe():
    assert set(PATHS) <= set(flatten(Config()))


@pytest.mark.parametrize("name", ["sounds", "Pack #2", "2024", "a: b", "[x]"])
def test_a_home_is_expanded_and_the_name_is_taken_as_it_is(home, name):
    assert load_recipe("tiny", [f"data.audio=~/{name}"]).data.audio == str(home / name)
    assert load_recipe("tiny", [f"data.audio={home / name}"]).data.audio == str(home / name)


def test_names_alone_are_taken_as_they_are(home, monkeypatch):
    monkeypatch.chdir(home)
    for name in ("Pack #2", "2024", "a: b", "[x]"):
        assert load_recipe("tiny", [f"data.audio={name}"]).data.audio == name
    assert load_recipe("tiny", ["data.audio='Pack #2'"]).data.audio == "Pack #2"  # quotes as YAML has them
    assert load_recipe("tiny", ["data.audio=null"]).data.audio is None
    assert load_recipe("tiny", ["data.audio=~"]).data.audio == str(home)
    assert load_recipe("tiny", ["name=Pack #2"]).run_dir == "runs/Pack #2"


def test_all_paths_are_expanded(home, tmp_path):
    config = load_recipe(
        "tiny",
        [
            *("run_dir=~/runs/x", "data.cache.folder=~/cache", "checkpoint.start_from=~/export"),
            *("data.mix={~/set: 2}", "evaluate.weights={dac: ~/dac}", "evaluate.weights.opus=~/o #1"),
            *("evaluate.embedding=clap:~/clap", "cluster=~/cluster.yaml", "checkpoint.resume=auto"),
        ],
    )
    assert (config.run_dir, config.data.latents) == (f"{home}/runs/x", f"{home}/runs/x/latents")
    assert (config.data.cache.folder, config.checkpoint.start_from) == (f"{home}/cache", f"{home}/export")
    assert config.data.mix == {f"{home}/set": 2}
    assert config.evaluate.weights == {"dac": f"{home}/dac", "opus": f"{home}/o #1"}
    assert (config.evaluate.embedding, config.checkpoint.resume) == (f"clap:{home}/clap", "auto")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {audio: ~/sounds}\n")
    assert load_recipe(str(recipe), []).data.audio == str(home / "sounds")


def test_an_unknown_home_stays_a_name():
    assert expanded("~nobody-of-this-name/x") == "~nobody-of-this-name/x"


def test_options_after_an_equals_sign_are_expanded(home):
    options = parser().parse_args(["encode", "~/sounds", "out", "--codec=~/export"])
    assert (options.input, options.codec) == (home / "sounds", home / "export")


def test_a_name_that_config_yaml_cannot_hold_is_told(home):
    name = os.fsdecode(b"caf\xe9")
    (home / name).mkdir()
    with pytest.raises(ValueError, match=r"data\.audio=.*/caf\\xe9 is not UTF-8, .*: rename it, or make a link to it"):
        load_recipe("tiny", [f"data.audio={home / name}"])
