"""Reads a recipe: YAML, the choices that it names, `key=value` overrides; refuses what is unknown or does not fit."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.recipes.schema import Config, recipe_schema
from trainer.recipes.values import flatten

RECIPES = Path(__file__).resolve().parents[2] / "configs"
_CHOICES = ("cluster",)
"""Keys whose value may be a name: it stands for the file of that name in `configs/KEY/`."""
_MODEL = "model"
"""The same, for a file that holds settings of several keys: all that goes with a pretrained model."""


def load_recipe(recipe: str, overrides: list[str], *, released: bool = True) -> Config:
    """Read a recipe, by path or by its name in `configs/`, merge `key=value` overrides, validate; `released`: whether
    folders of pretrained weights have to be there, too.

    Raises:
        ValueError: the recipe is not found, a key is unknown, a value does not fit, or settings contradict each other;
            the message holds every problem, a line each.
    """
    from trainer.recipes.validation import problems

    schema = OmegaConf.structured(recipe_schema())
    try:
        merged = OmegaConf.merge(schema, *_layers(_read_recipe(find_recipe(recipe)), overrides))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error, schema)) from None
    assert isinstance(config, Config)
    if found := problems(config, released=released):
        raise ValueError("\n".join(found))
    return config


def find_recipe(recipe: str) -> Path:
    """Path of a recipe given by path or by name."""
    for path in (Path(recipe), RECIPES / f"{recipe}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise ValueError(f"no recipe {recipe!r}: give a YAML file, or one of {', '.join(known)}")


def _layers(recipe: DictConfig, overrides: list[str]) -> list[DictConfig]:
    """What is merged, in this order: the files that recipe or overrides choose, the recipe, the overrides.

    A model that the overrides choose comes after the recipe, which may have been written for another.
    """
    before, recipe, after, overrides = _with_model(recipe, overrides)
    chosen = {}
    for key in _CHOICES:
        if isinstance(OmegaConf.to_container(recipe).get(key), str):  # type: ignore[union-attr]
            chosen[key] = recipe.pop(key)
        for override in [item for item in overrides if item.startswith(f"{key}=")]:
            chosen[key] = override.partition("=")[2]
            overrides = [item for item in overrides if item != override]
    files = [OmegaConf.create({key: _read_recipe(find_choice(key, name))}) for key, name in chosen.items()]
    return [*before, *files, recipe, *after, _parse(overrides)]


def _with_model(
    recipe: DictConfig, overrides: list[str]
) -> tuple[list[DictConfig], DictConfig, list[DictConfig], list[str]]:
    """The layer of the recipe's model, the recipe itself, the layer of the overrides' model, the other overrides."""
    own = recipe.pop(_MODEL, None)
    given = [item.partition("=")[2] for item in overrides if item.startswith(f"{_MODEL}=")]
    rest = [item for item in overrides if not item.startswith(f"{_MODEL}=")]
    if given:
        layer = _read_recipe(find_choice(_MODEL, given[-1]))
        if "diffusion" in layer:
            recipe.pop("diffusion", None)  # the options of one formulation are none of another's
        return [], recipe, [layer], rest
    return [_read_recipe(find_choice(_MODEL, str(own)))] if own is not None else [], recipe, [], rest


def find_choice(key: str, name: str) -> Path:
    """Path of what `key=name` stands for: `configs/key/name.yaml`, or a file."""
    for path in (Path(name), RECIPES / key / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in (RECIPES / key).glob("*.yaml"))
    raise ValueError(f"there is no {key}={name}: give a YAML file, or one of {', '.join(known)}")


def _read_recipe(path: Path) -> DictConfig:
    try:
        recipe = OmegaConf.load(path)
    except Exception as error:  # the YAML library's own errors share no useful base class
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, DictConfig):
        raise ValueError(f"{path} holds no keys: a recipe is a mapping such as `name: demo`")
    return recipe


def _parse(overrides: list[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"{override!r} is no override: write key=value, such as autoencode.lr=1e-4")
    parsed = []
    for override in overrides:
        try:
            parsed.append(OmegaConf.from_dotlist([override]))
        except yaml.YAMLError as error:
            raise ValueError(f"the value in {override!r} is not valid YAML: {' '.join(str(error).split())}") from None
    merged = OmegaConf.merge(*parsed) if parsed else OmegaConf.create()
    assert isinstance(merged, DictConfig)
    return merged


def _explain(error: OmegaConfBaseException, schema: DictConfig) -> str:
    key = error.full_key or ""
    text = str(error.msg or error).splitlines()[0]
    if "not in" not in text:
        return f"{key}: {text}"
    known = list(flatten(OmegaConf.to_object(schema))) + [item.name for item in dataclasses.fields(recipe_schema())]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown key {key}: the nearest known one is {near[0]}"
