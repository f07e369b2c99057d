"""A recipe's values: as YAML, as dotted keys, as a hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from omegaconf import OmegaConf

from trainer.recipes.schema import Config, recipe_schema


def to_yaml(config: Config) -> str:
    """The resolved config; a run can be started from it alone."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), prefix + item.name
        flat |= flatten(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return flat


def added_later() -> dict[str, Any]:
    """Dotted keys of the settings that older runs did not have → their defaults."""

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
    """Short hash of plain values, the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
