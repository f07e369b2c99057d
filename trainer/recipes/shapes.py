"""Whether the values of a recipe have the shape that the schema wants: a table, a list, or a single value.

omegaconf checks single values; a value of another shape is a TypeError there, which names no key.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.recipes.schema import recipe_schema
from trainer.recipes.text import hint_below, kind_without_none

_TABLE, _LIST, _SINGLE = "a table such as `{a: 1}`", "a list such as `[1, 2]`", "a single value"


def misshapen(values: Mapping[Any, Any]) -> list[str]:
    """Return a line for each value of a recipe that has another shape than its key wants; unknown keys are left out.

    Args:
        values: the recipe's plain values as nested tables.
    """
    return list(_misshapen(values, recipe_schema(), ""))


def _misshapen(value: Any, hint: Any, key: str) -> Iterator[str]:
    wanted = _wanted(hint)
    if wanted is None or value is None or (isinstance(value, str) and (value == "???" or "${" in value)):
        return  # omegaconf puts another value in its place, or says that it is missing
    if wanted != (found := _shape_of(value)):
        yield f"{key} must be {wanted}, not {found.partition(' such')[0]}"
    elif isinstance(value, Mapping):
        for name, item in value.items():
            below = hint_below(kind_without_none(hint), str(name))
            yield from _misshapen(item, below, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _misshapen(item, typing.get_args(kind_without_none(hint))[0], f"{key}[{number}]")


def _wanted(hint: Any) -> str | None:
    """Return the shape of the values of a type; None if they may have any."""
    kind = kind_without_none(hint)
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict:
        return _TABLE
    if typing.get_origin(kind) is list:
        return _LIST
    return _SINGLE if kind in (int, float, bool, str) else None


def _shape_of(value: Any) -> str:
    return _TABLE if isinstance(value, Mapping) else _LIST if isinstance(value, list) else _SINGLE
