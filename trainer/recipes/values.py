"""Converts the values of a recipe to YAML, to dotted keys and to a hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from models.later_fields import is_added_later, value_before
from trainer.recipes.schema import Config, recipe_schema

_SECTIONS = {"name", "run_dir", "seed", "data", "quantizer", "parallel", "cluster", "checkpoint", "evaluate"}
"""Keys that the config of every run has, of any version."""


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


def older_values() -> dict[str, Any]:
    """Return what the settings that older runs did not have mean for such a run, by their dotted keys.

    The hash of a run's settings leaves such a setting out while it has this value, so that older checkpoints keep the
    hash that they were saved with.
    """
    every = settings(recipe_schema()())
    return {key: value_before(item) for key, item, _ in every if is_added_later(item)}


def is_stored(values: Mapping[Any, Any]) -> bool:
    """Whether these are the values of a run's `config.yaml`, of any version, rather than of a recipe by hand."""
    return values.keys() >= _SECTIONS


def hash_values(values: dict[str, Any]) -> str:
    """Return a short hash of plain values that is the same in every process."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
