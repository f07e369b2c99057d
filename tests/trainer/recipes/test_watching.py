"""How a recipe's runs are watched is checked before anything starts."""

from __future__ import annotations

import importlib.util

import pytest

from trainer.recipes.reading import load_recipe

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "log.trackers=[tensorboard,aim]",
            "log.trackers holds aim, which is none of tensorboard, wandb, mlflow, trackio",
        ),
        ("log.trackers=[wandb,wandb]", "names a tracker twice: remove one"),
        ("log.project=' '", "log.project is empty"),
        ("log.prometheus=run.txt", "log.prometheus=run.txt must end in .prom"),
        (f"log.notify=say '{SECRET}", "log.notify is no command: No closing quotation"),
        ("log.notify='  '", "log.notify is empty"),
    ],
)
def test_what_can_not_work_is_refused(override, problem):
    with pytest.raises(ValueError, match=r"^log\.") as raised:
        load_recipe("tiny", [override])
    assert problem in str(raised.value)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named_with_its_command(name, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *more: None if wanted == name else find(wanted, *more)
    )
    package = {"mlflow": "mlflow-skinny"}.get(name, name)
    with pytest.raises(ValueError, match=f"{name} is not installed: pip install {package} .*, or remove {name}"):
        load_recipe("tiny", [f"log.trackers=[{name}]"])


def test_the_paths_and_the_defaults():
    assert load_recipe("tiny", []).log.trackers == ["tensorboard"]
    log = load_recipe("tiny", ["log.prometheus=~/x/${name}.prom", "log.trackers=[]"]).log
    assert log.prometheus is not None
    assert log.prometheus.endswith("/x/tiny.prom")
    assert not log.prometheus.startswith("~")
    assert log.trackers == []
