"""Reads a recipe: its YAML file, the files that it names (`cluster`, `model`), and `key=value` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models.readable import file_trouble, require_file
from models.sizes import DiTConfig
from models.yaml_document import read_yaml
from trainer.recipes.paths import expand_homes, expanded
from trainer.recipes.privacy import keys_from_environment
from trainer.recipes.schema import Config, recipe_schema
from trainer.recipes.shapes import misshapen
from trainer.recipes.text import is_text, may_be_none, quote_text
from trainer.recipes.values import flatten, is_stored, older_values

RECIPES = Path(__file__).resolve().parents[2] / "configs"
_CHOICES = ("cluster",)
"""Keys whose value may be a name: the name stands for the content of `configs/KEY/NAME.yaml`."""
_NONE = ("", "null", "Null", "NULL")
_MODEL = "model"
"""Key whose value names a file in `configs/model/` with all settings of a pretrained model, under several keys."""
_NO_NUMBER = re.compile(r"Value '(.*)' of type '.*' could not be converted to (Integer|Float)")
_NUMBERS = {"Integer": "whole number", "Float": "number"}
"""What OmegaConf calls a number → what an error does."""


def load_recipe(recipe: str, overrides: list[str], *, released: bool = True) -> Config:
    """Read a recipe, merge the overrides into it, and validate the result.

    Args:
        recipe: path of a YAML file, or the name of one in `configs/`.
        overrides: settings as `key=value`.
        released: whether the folders of pretrained weights must exist.

    Raises:
        ValueError: the recipe is not found, a key is unknown, a value does not fit, or settings contradict each other;
            the message has a line for every problem.
    """
    from trainer.recipes.validation import problems

    config, found = _read_config(recipe, overrides)
    if found := [*found, *problems(config, released=released)]:
        raise ValueError("\n".join(found))
    return config


def read_stored_config(path: Path) -> Config:
    """Read the config.yaml of a run, whose data and pretrained weights need not be there any more.

    Raises:
        ValueError: the file is no config, or a value in it does not fit; the message has a line for every problem.
    """
    config, found = _read_config(str(path), [])
    if found:
        raise ValueError("\n".join(f"{path}: {line}" for line in found))
    return config


def _read_config(recipe: str, overrides: list[str]) -> tuple[Config, list[str]]:
    """Read and merge a recipe; return the config, and why no D has the sizes in it. Raises ValueError."""
    from trainer.recipes.validation import value_problems

    kind: Any = recipe_schema()  # to mypy, the class is as unhashable as its instances
    schema = _structured(kind)
    sizes: list[str] = []
    try:
        layers = _layers(_read_recipe(find_recipe(recipe)), overrides)
        if strange := [line for layer in layers for line in misshapen(OmegaConf.to_container(layer))]:  # type: ignore[arg-type]
            raise ValueError("\n".join(strange))
        merged = OmegaConf.merge(schema, *layers)
        values: Any = OmegaConf.to_container(merged, resolve=True)
        if found := value_problems(values):
            raise ValueError("\n".join(found))
        if sizes := _problems_of_dit(values["dit"]):
            merged.dit = OmegaConf.structured(DiTConfig)  # wrong sizes can't be built; the default ones fit
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error, schema)) from None
    assert isinstance(config, Config)
    assert isinstance(merged, DictConfig)
    config.private = sorted({*config.private, *keys_from_environment(merged)})
    expand_homes(config)
    return config, sizes


@functools.cache
def _structured(schema: Any) -> DictConfig:
    """Return the schema as OmegaConf has it, which takes half the time of reading a recipe. A merge copies it."""
    return OmegaConf.structured(schema)


def _problems_of_dit(sizes: dict[str, Any]) -> list[str]:
    """Return why no D has these sizes, each of which is in its range; empty if one has."""
    try:
        DiTConfig(**sizes)
    except ValueError as error:
        return [f"dit: {problem}" for problem in str(error).split("; ")]
    return []


def find_recipe(recipe: str) -> Path:
    """Return the path of a recipe that is given by path or by its name in `configs/`; raises ValueError."""
    for path in (Path(expanded(recipe)), RECIPES / f"{recipe}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise ValueError(f"no recipe {recipe!r}{_what_is_there(recipe)}: give a YAML file, or one of {', '.join(known)}")


def _what_is_there(name: str) -> str:
    """Return what is wrong with a path that was given for a YAML file; empty for a mere name such as `demo`."""
    path = Path(name)
    is_path = path.suffix in (".yaml", ".yml") or path.name != name or path.exists() or path.is_symlink()
    return f", because {name} {file_trouble(path)}" if is_path else ""


def _layers(recipe: DictConfig, overrides: list[str]) -> list[DictConfig]:
    """Return the layers to merge: files that the recipe or the overrides name, then the recipe, then the overrides.

    A model that the overrides name comes after the recipe, which may have been written for another model.
    """
    before, recipe, after, overrides = _with_model(recipe, overrides)
    chosen = {}
    for key in _CHOICES:
        if isinstance(OmegaConf.to_container(recipe).get(key), str):  # type: ignore[union-attr]
            chosen[key] = recipe.pop(key)
        for override in [item for item in overrides if item.startswith(f"{key}=")]:
            chosen[key] = override.partition("=")[2]
            overrides = [item for item in overrides if item != override]
    files = [OmegaConf.create({key: _read_recipe(find_choice(key, name), key)}) for key, name in chosen.items()]
    return [*before, *files, recipe, *after, _parse(overrides)]


def _with_model(
    recipe: DictConfig, overrides: list[str]
) -> tuple[list[DictConfig], DictConfig, list[DictConfig], list[str]]:
    """Return the layer of the recipe's model, the recipe, the layer of the overrides' model, the other overrides."""
    own = recipe.pop(_MODEL, None)
    models = [item.partition("=")[2] for item in overrides if item.startswith(f"{_MODEL}=")]
    others = [item for item in overrides if not item.startswith(f"{_MODEL}=")]
    if models:
        layer = _read_recipe(find_choice(_MODEL, models[-1]))
        if "diffusion" in layer:
            recipe.pop("diffusion", None)  # the options of one formulation are unknown to another
        return [], recipe, [layer], others
    return [_read_recipe(find_choice(_MODEL, str(own)))] if own is not None else [], recipe, [], others


def find_choice(key: str, name: str) -> Path:
    """Return the file that `key=name` stands for: the path itself, or `configs/key/name.yaml`; raises ValueError."""
    for path in (Path(expanded(name)), RECIPES / key / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in (RECIPES / key).glob("*.yaml"))
    raise ValueError(f"there is no {key}={name}{_what_is_there(name)}: give a YAML file, or one of {', '.join(known)}")


def _read_recipe(path: Path, key: str = "") -> DictConfig:
    """Read a recipe, or what belongs under a key of one."""
    require_file(path)
    mend = "a recipe is a YAML file with keys such as `name: demo`"
    recipe = read_yaml(path, mend=mend, prepare=functools.partial(quote_text, key=key))
    return _with_older_values(recipe) if is_stored(recipe) else recipe


def _with_older_values(stored: DictConfig) -> DictConfig:
    """Add the settings that a run's config lacks because they are newer than the run."""
    before = OmegaConf.create({})
    for key, value in older_values().items():
        OmegaConf.update(before, key, value)
    merged = OmegaConf.merge(before, stored)
    assert isinstance(merged, DictConfig)
    return merged


def _parse(overrides: list[str]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"{override!r} is not an override: write key=value, such as autoencode.lr=1e-4")
    parsed = []
    for override in overrides:
        key, _, value = override.partition("=")
        if is_text(key) and value[:1] not in ("'", '"') and not (value in _NONE and may_be_none(key)):
            # Text is not YAML, in which ` #` begins a comment, `~` is nothing, and `007` and `on` are other values.
            parsed.append(OmegaConf.create({}))
            OmegaConf.update(parsed[-1], key, value)
            continue
        try:
            parsed.append(OmegaConf.from_dotlist([f"{key}={quote_text(value, key=key)}"]))
        except yaml.YAMLError as error:
            raise ValueError(f"the value in {override!r} is not valid YAML: {' '.join(str(error).split())}") from None
    merged = OmegaConf.merge(*parsed) if parsed else OmegaConf.create()
    assert isinstance(merged, DictConfig)
    return merged


def _explain(error: OmegaConfBaseException, schema: DictConfig) -> str:
    key = error.full_key or ""
    text = str(error.msg or error).splitlines()[0]
    if wrong := _NO_NUMBER.match(text):
        return f"{key}={wrong[1]} is no {_NUMBERS[wrong[2]]}"
    if "not in" not in text:
        return f"{key}: {text}"
    known = list(flatten(OmegaConf.to_object(schema))) + [item.name for item in dataclasses.fields(recipe_schema())]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown key {key}: the nearest known one is {near[0]}"
