"""The range of a number, which stands beside the number's field in a dataclass. This module needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LARGEST_SIZE = 2**24
"""The largest size that a config may name, see `models.documents.Size`."""
_DEEPEST = 2**12
"""The largest number of Transformer blocks."""
_KEY = "range"
_END_OF_INTEGERS = 2**63  # files and tensors hold integers below it
_END_OF_FLOATS = 1e15  # no setting means more, and products with it stay finite and exact enough to count


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have: all finite ones between its ends.

    Where an end is None, whole numbers end as 64-bit integers do, and others at ±10^15 unless they are `unlimited`.
    """

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    note: str = ""
    """What a special value means, such as "null turns clipping off"."""
    unlimited: bool = False
    """Whether the number may also be infinite, which stands for no limit."""

    def __str__(self) -> str:
        """Return the range in words, such as "at least 0 and below 1"."""
        ends = (("above", self.above), ("at least", self.least), ("below", self.below), ("at most", self.most))
        words = " and ".join(f"{word} {end}" for word, end in ends if end is not None) or "a finite number"
        return "; ".join(filter(None, (words, self.note, ".inf: no limit" if self.unlimited else "")))

    def __contains__(self, value: float) -> bool:
        """Whether a number is finite and between the ends."""
        if isinstance(value, int):
            if self.most is None and not -_END_OF_INTEGERS <= value < _END_OF_INTEGERS:
                return False
        elif not math.isfinite(value):
            return self.unlimited and value == math.inf
        elif not self.unlimited and abs(value) > _END_OF_FLOATS:
            return False
        return (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def problem(self, name: str, value: float) -> str:
        """Return a line that refuses the value of a setting; empty if the value is in the range."""
        if value in self:
            return ""
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name}={value} must be a finite number"
        return f"{name}={value} must be {self._end_passed(value)}{self}"

    def _end_passed(self, value: float) -> str:
        """Return the words for the end of all numbers of its type, if a value is beyond it; else an empty text."""
        if isinstance(value, int):
            return "below 2^63 and " if value >= _END_OF_INTEGERS and self.most is None else ""
        return "between -1e15 and 1e15 and " if abs(value) > _END_OF_FLOATS and not self.unlimited else ""


def ranged(
    default: Any | Callable[[], Any],
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    note: str = "",
    unlimited: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Any:
    """Return the field of a number with its range, or of a list or table of numbers, each of which has that range.

    Args:
        default: default of the field; a function that returns it, for a list or a table.
        above, least, below, most: ends of the range.
        note: what a special value means.
        unlimited: whether the number may also be infinite.
        metadata: further metadata of the field.
    """
    described = {**(metadata or {}), _KEY: Range(above, least, below, most, note, unlimited)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=described)
    return dataclasses.field(default=default, metadata=described)


def range_of(field: dataclasses.Field[Any]) -> Range | None:
    """Return the range that stands beside a field; None if it has none."""
    return field.metadata.get(_KEY)


def range_problems(name: str, values: Any, allowed: Range) -> list[str]:
    """Return a line for each number out of a range: the value of a setting, or the numbers in its list or table."""
    if values is None:
        return []
    if isinstance(values, Mapping):
        named = [(f"{name}: {key}", value) for key, value in values.items()]
    elif isinstance(values, list | tuple):
        named = [(f"{name}[{number}]", value) for number, value in enumerate(values)]
    else:
        named = [(name, values)]
    return [line for key, value in named if value is not None and (line := allowed.problem(key, value))]


def sizes_out_of_range(config: object, names: tuple[str, ...], *, least: int = 1) -> Iterator[str]:
    """Yield a line for each of the sizes in a config that is below `least`, or that no model has."""
    for name in names:
        value, most = getattr(config, name), _DEEPEST if name.endswith("depth") else LARGEST_SIZE
        if value < least:
            yield f"{name} is {value}: give at least {least}"
        elif value > most:
            yield f"{name} is {value}: give at most {most}"
