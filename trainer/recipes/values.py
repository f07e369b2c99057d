"""Converts the values of a recipe to YAML, to dotted keys and to a hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from trainer.recipes.schema import Config, recipe_schema


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML, from which alone a run can be started."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def flatten(config: Any) -> dict[str, Any]:
    """Return the plain values of a dataclass and of those nested in it, by their dotted keys."""
    return {key: value for key, _, value in settings(config)}


def settings(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield the dotted key, the field and the value of each setting of a dataclass and of those nested in it."""
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{key}.")
        else:
            yield key, item, value


def added_later() -> dict[str, Any]:
    """Return the defaults of the settings that older runs did not have, by their dotted keys."""
    return {key: value for key, item, value in settings(recipe_schema()()) if item.metadata.get("added_later")}


def hash_values(values: dict[str, Any]) -> str:
    """Return a short hash of plain values that is the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
