"""Secrets of a recipe do not reach the page: the cluster part, environment variables, credentials in URLs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from launch import pipeline
from trainer.recipes.privacy import public_settings, public_yaml
from trainer.recipes.reading import load_recipe
from trainer.recipes.values import to_yaml

SECRET = "hunter2"
PLACES = (
    "run_dir=/runs/${oc.env:OF_MINE}",
    "data.latents=${oc.env:OF_MINE}/latents",
    "checkpoint.start_from=${oc.env:OF_MINE,nothing}",
    "text.kind=none\ntext.folder=${oc.env:OF_MINE}",
    "cluster.environment={TOKEN: hunter2}",
    "cluster.environment={TOKEN: '${oc.env:OF_MINE}'}",
    "cluster.setup=[export TOKEN=hunter2]",
    "cluster.account=hunter2",
    "log.notify=https://hooks.example/hunter2",
    "log.notify=curl -H 'key: hunter2' host",
    "cluster.stages={evaluate: {environment: {TOKEN: hunter2}}}",
    "data.mix={'https://me:hunter2@host/set': 1}",
    "data.mix={'https://host/set?token=hunter2&key=hunter2': 1}",
    "data.mix={'${oc.env:OF_MINE}/set': 1}",
    "evaluate.weights={dac: /x/hunter2}\nprivate=[evaluate.weights]",
)


def loaded(lines: list[str]):
    overrides = [override for line in lines for override in line.split("\n")]
    return load_recipe("tiny", ["data.audio=", *overrides], released=False)


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("OF_MINE", SECRET)
    monkeypatch.setattr("trainer.recipes.validation._folders", lambda config: [])
    monkeypatch.setattr("trainer.recipes.validation._evaluation", lambda config: [])


@pytest.mark.parametrize("place", PLACES)
def test_a_secret_stays_out(place):
    config = loaded([place])
    public = public_yaml(config)
    assert SECRET not in public
    assert "cluster" not in yaml.safe_load(public)
    assert yaml.safe_load(public)["seed"] == config.seed


def test_what_refers_to_a_secret_stays_out_too():
    config = loaded(["run_dir=/runs/${oc.env:OF_MINE}", "data.latents=${run_dir}/latents", "name=x"])
    assert config.private == ["data.latents", "run_dir"]
    assert "name: x" in public_yaml(config)


def test_a_run_s_own_config_knows_what_is_private(tmp_path):
    config = loaded(
        ["run_dir=/runs/${oc.env:OF_MINE}", "evaluate.weights={dac: /x/hunter2}", "private=[evaluate.weights]"]
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_recipe(str(tmp_path / "config.yaml"), [], released=False)
    assert again == config
    assert SECRET not in public_yaml(again)


def test_secrets_at_random_places_stay_out():
    for seed in range(20):
        chance = random.Random(seed)
        lines = chance.sample(PLACES, chance.randrange(2, 6))
        assert SECRET not in public_yaml(loaded(lines)), lines


def test_without_secrets_all_else_is_there():
    config = load_recipe("tiny", [])
    whole = yaml.safe_load(to_yaml(config))
    del whole["log"]["notify"]
    assert yaml.safe_load(public_yaml(config)) == {
        key: whole[key] for key in whole if key not in ("cluster", "private")
    }


@pytest.mark.parametrize("place", PLACES)
def test_trackers_get_settings_without_secrets(place):
    config = loaded([place])
    settings = public_settings(config)
    assert SECRET not in str(settings)
    assert settings["seed"] == config.seed
    assert settings["autoencode.lr"] == config.stage("autoencode").lr
    assert not [key for key in settings if key.startswith("cluster.")]


def test_the_page_shows_what_may_be_published(monkeypatch, tmp_path):
    shown = {}
    report = {"clips": [], "systems": []}
    monkeypatch.setattr(pipeline, "_evaluated", lambda config: report)
    monkeypatch.setattr(pipeline, "clear_page", lambda folder: None)
    monkeypatch.setattr(pipeline, "write_page", lambda *unused, **given: shown.update(given) or Path("index.html"))
    config = loaded(["cluster.environment={TOKEN: hunter2}"])
    config.run_dir = str(tmp_path)
    pipeline.page(config)
    assert SECRET not in shown["config_text"]
    assert "seed:" in shown["config_text"]


def test_a_private_key_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"private: there is no key data.adio; the nearest one is data.audio"):
        loaded(["private=[data.adio, data]"])
