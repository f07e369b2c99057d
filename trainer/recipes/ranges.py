"""The ranges of all numbers of a recipe, collected from its schema, and the values that are out of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from models.ranges import Range, range_of, range_problems
from trainer.recipes.schema import recipe_schema
from trainer.recipes.values import settings


def all_ranges() -> dict[str, Range]:
    """Return the range of each number of a recipe by its dotted key; that of a list or table holds for its numbers."""
    found = ((key, range_of(item)) for key, item, _ in settings(recipe_schema()()))
    return {key: allowed for key, allowed in found if allowed is not None}


def out_of_range(values: Mapping[str, Any]) -> list[str]:
    """Return a line for each number of a recipe that is out of its range; `values` are a recipe's as nested tables."""
    return [
        line for key, allowed in all_ranges().items() for line in range_problems(key, value_at(values, key), allowed)
    ]


def value_at(values: Mapping[str, Any], key: str) -> Any:
    """Return the value with a dotted key in nested tables."""
    *groups, name = key.split(".")
    for group in groups:
        values = values[group]
    return values[name]


def with_ranges(text: str) -> str:
    """Return the YAML of a recipe with a comment after each number that names its range."""
    lines, allowed = text.splitlines(), all_ranges()

    def comment(node: yaml.Node, prefix: str) -> None:
        assert isinstance(node, yaml.MappingNode)
        for name, value in node.value:
            key = prefix + name.value
            if key in allowed:
                lines[name.start_mark.line] += f"  # {allowed[key]}"
            elif isinstance(value, yaml.MappingNode):
                comment(value, f"{key}.")

    comment(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return "\n".join(lines) + "\n"
