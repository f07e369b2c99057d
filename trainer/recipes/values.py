"""Converts the values of a recipe to YAML, to dotted keys and to a hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from omegaconf import OmegaConf

from trainer.recipes.schema import Config, recipe_schema


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML, from which alone a run can be started."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the plain values of a dataclass and of those nested in it, by their dotted keys."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), prefix + item.name
        flat |= flatten(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return flat


def added_later() -> dict[str, Any]:
    """Return the defaults of the settings that older runs did not have, by their dotted keys."""

    def found(config: Any, prefix: str) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for item in dataclasses.fields(config):
            value, key = getattr(config, item.name), prefix + item.name
            if dataclasses.is_dataclass(value):
                keys |= found(value, f"{key}.")
            elif item.metadata.get("added_later"):
                keys[key] = value
        return keys

    return found(recipe_schema()(), "")


def hash_values(values: dict[str, Any]) -> str:
    """Return a short hash of plain values that is the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
