"""Keeps parts of a recipe private: `cluster`, `log.notify`, values from the environment, and credentials in URLs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trainer.recipes.ranges import value_at
from trainer.recipes.schema import Config, recipe_schema
from trainer.recipes.values import flatten
from trainer.urls import without_credentials

_NEVER = ("cluster", "log.notify", "private")
"""Keys that are never published: the address of a webhook is a secret as a whole."""
_FROM_ENVIRONMENT = "oc.env"
_REFERENCE = re.compile(r"\$\{\s*([^}:]+?)\s*\}")


def keys_from_environment(recipe: DictConfig) -> list[str]:
    """Return the dotted keys of a merged recipe whose values hold `${oc.env:NAME}`, or refer to one that does."""
    written = dict(_interpolations(OmegaConf.to_container(recipe), ()))
    found = {path for path, text in written.items() if _FROM_ENVIRONMENT in text}
    while True:
        names = {path[-1] for path in found}
        further = {path for path, text in written.items() if names & _referred_to(text)} - found
        if not further:
            break
        found |= further
    known = sorted(flatten(recipe_schema()()), key=len, reverse=True)
    return sorted({_setting(".".join(path), known) for path in found})


def unknown_private_keys(config: Config) -> list[str]:
    """Return a line for each entry of `private` that is neither a setting nor a part of the recipe."""
    known = [*flatten(config)]
    parts = {key.rpartition(".")[0] for key in known}
    unknown = [key for key in config.private if key not in known and key not in parts]
    nearest = {key: difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0] for key in unknown}
    return [f"private: there is no key {key}; the nearest one is {near}" for key, near in nearest.items()]


def public_values(config: Config) -> dict[str, Any]:
    """Return the config as it may be published, as nested tables.

    It lacks `cluster`, `log.notify`, `private` and the keys in it, and credentials in URLs.
    """
    values: Any = OmegaConf.to_container(OmegaConf.structured(config))
    for key in (*_NEVER, *config.private):
        _remove(values, key.split("."))
    return _cleaned(values)


def public_yaml(config: Config) -> str:
    """Return the config as it may be published, see `public_values`, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(public_values(config)))


def public_settings(config: Config) -> dict[str, Any]:
    """Return the settings that may be published, see `public_values`, by their dotted keys."""
    values = public_values(config)
    return {key: value_at(values, key) for key in flatten(config) if _is_at(values, key)}


def stored_yaml(config: Config, learned: Callable[[str], bool]) -> str:
    """Return the config as it lies beside a run on a store, as YAML: `public_yaml` with all that a stage learns from.

    `cluster` and `private` are there, and empty, because a run's own config has all sections. `log.notify` is not.
    """
    values: Any = OmegaConf.to_container(OmegaConf.structured(config))
    private = tuple(f"{name}." for name in config.private)
    hidden = [key for key in flatten(config) if f"{key}.".startswith(private) and not learned(key)]
    for key in (*_NEVER, *hidden):
        _remove(values, key.split("."))
    return OmegaConf.to_yaml(OmegaConf.create(_cleaned(values | {"cluster": {}, "private": []})))


def _interpolations(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path and the text of each value that stands for another."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _interpolations(item, (*path, str(name)))
    elif isinstance(value, list):
        for item in value:
            yield from _interpolations(item, path)
    elif isinstance(value, str) and "${" in value:
        yield path, value


def _referred_to(text: str) -> set[str]:
    """Return the last names of the keys to which a value refers: `${a.b}` → b."""
    return {reference.rpartition(".")[2] for reference in _REFERENCE.findall(text)}


def _setting(key: str, known: list[str]) -> str:
    """Return the setting to which a key belongs: one entry of a table, such as `data.mix`, is not named alone."""
    return next((name for name in known if f"{key}.".startswith(f"{name}.")), key)


def _remove(values: dict[str, Any], names: list[str]) -> None:
    *groups, last = names
    for group in groups:
        values = values.get(group, {})
    values.pop(last, None)


def _is_at(values: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {_cleaned(name): _cleaned(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value
