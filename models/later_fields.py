"""Fields of dataclasses that older files and recipes lack, and what each of them means there. Needs no torch.

A new setting may change the default, but never what an older export, checkpoint or stored config stands for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_BEFORE = "before"


def since(default: Any, *, before: Any) -> Any:
    """Return a dataclass field that older files lack; a file without it is read as if it had the value `before`."""
    return dataclasses.field(default=default, metadata=added_later(before))


def added_later(before: Any) -> dict[str, Any]:
    """Return the metadata of a field that older files lack, where it means `before`."""
    return {_BEFORE: before}


def is_added_later(field: dataclasses.Field[Any]) -> bool:
    """Whether older files lack a field."""
    return _BEFORE in field.metadata


def value_before(field: dataclasses.Field[Any]) -> Any:
    """Return what a field means in an older file, which lacks it."""
    return field.metadata[_BEFORE]


def values_before(kind: type[Any]) -> dict[str, Any]:
    """Return what the later fields of a dataclass mean in an older file, by their names."""
    return {field.name: value_before(field) for field in dataclasses.fields(kind) if is_added_later(field)}


def without_later(values: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Return a dataclass's values without the later fields that mean the same as in an older file.

    A hash of the rest is the one that an older version computed of the same settings.
    """
    before = values_before(kind)
    return {name: value for name, value in values.items() if name not in before or value != before[name]}
