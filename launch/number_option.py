"""Options of the command line that are numbers: each has its range, which its help shows and which is checked."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from models.ranges import Range

_SHOWN = 40  # characters of a wrong number in the message that refuses it


@dataclass(frozen=True)
class NumberType:
    """The `type` of an option that is a number, for argparse."""

    kind: type[int] | type[float]
    """`int` for a whole number, `float` for any number."""
    allowed: Range
    """The numbers that the option may have."""

    def __call__(self, text: str) -> float:
        """Return the number that a text stands for. Raises ArgumentTypeError if the option can't have it."""
        try:
            value = self.kind(text)
        except ValueError:
            kind = "a whole number" if self.kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{_shortened(text)} is not {kind}; it must be {self.allowed}") from None
        if problem := self.allowed.problem("", value):
            raise argparse.ArgumentTypeError(f"{_shortened(text)}{problem.removeprefix(f'={value}')}")
        return value


def add_number(
    parser: argparse.ArgumentParser,
    name: str,
    allowed: Range,
    help_: str,
    *,
    kind: type[int] | type[float] = int,
    default: float | None = None,
    without: str = "%(default)s",
    bare: float | None = None,
) -> None:
    """Add an option that is a number.

    Args:
        parser: parser of the command.
        name: name of the option, such as `--steps`.
        allowed: the numbers that the option may have.
        help_: what the number is.
        kind: `int` for a whole number.
        default: value if the option is not given.
        without: how the help names the default.
        bare: value if the option is given without a number; None: it must have one.
    """
    described = f"{help_} (default: {without}; {str(allowed).replace('%', '%%')})"
    optional: dict[str, Any] = {} if bare is None else {"nargs": "?", "const": bare}
    parser.add_argument(name, type=NumberType(kind, allowed), default=default, help=described, **optional)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
