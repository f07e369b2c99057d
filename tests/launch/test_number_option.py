"""Numbers on the command line: each has a range, which is in its help; a number out of it gets a clear line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import get_type_hints

import pytest

from launch.cli import main, parser
from launch.number_option import NumberType
from models.bitstream import RATE_RANGE
from models.ranges import Range
from trainer.log.trace_request import TraceRequest
from trainer.recipes.ranges import all_ranges

ODD = ("0", "-1", "nan", "inf", "-inf", "1e30", "1e400", "0.5", str(2**63), str(2**64), "9" * 5000, "", "x", "1,5")


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """All commands with their parsers."""
    (subs,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    yield from subs.choices.items()


def options() -> list[argparse.Action]:
    """All options of all commands that take a value."""
    return [action for _, sub in commands() for action in sub._actions if action.nargs != 0]


def numbers() -> list[tuple[str, argparse.Action]]:
    """(command, option) of all options that are numbers."""
    return [
        (name, action) for name, sub in commands() for action in sub._actions if isinstance(action.type, NumberType)
    ]


def stands_for(kind: type, text: str) -> float | None:
    """The number that a text stands for; None if it is none."""
    try:
        return kind(text)
    except ValueError:
        return None


def test_every_number_has_a_range():
    assert len(numbers()) == 17
    for action in options():
        is_number = action.type in (int, float, complex) or isinstance(action.default, int | float)
        assert not is_number or isinstance(action.type, NumberType), action.option_strings
        if isinstance(action.type, NumberType):
            assert action.type.allowed != Range(), action.option_strings


@pytest.mark.parametrize(
    ("command", "option"), [pytest.param(*case, id=f"{case[0]}{case[1].dest}") for case in numbers()]
)
def test_a_number_out_of_its_range_gets_a_line(command, option, capsys):
    flag, number, required = option.option_strings[0], option.type, required_of(command)
    refused = 0
    for text in ODD:
        value = stands_for(number.kind, text)
        if value is not None and value in number.allowed:
            assert getattr(parser().parse_args([command, *required, f"{flag}={text}"]), option.dest) == value
            continue
        refused += 1
        with pytest.raises(SystemExit) as end:
            main([command, *required, f"{flag}={text}"])
        assert end.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"spresso {command}: error: argument {flag}: ")
        assert str(number.allowed) in line or "finite" in line or "2^63" in line
        assert len(line) < 200
    assert refused >= 9


@pytest.mark.parametrize("command", sorted({name for name, _ in numbers()}))
def test_the_help_names_the_ranges(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for name, option in numbers():
        assert name != command or f"; {option.type.allowed})" in told


def test_ranges_that_stand_elsewhere_too_are_the_same():
    found = {(name, option.dest): option.type.allowed for name, option in numbers()}
    assert (found["decode", "rate"].least, found["decode", "rate"].most) == RATE_RANGE
    assert found["synth", "seed"] == all_ranges()["seed"]
    assert found["synth", "workers"] == found["index", "workers"]
    (bounds,) = get_type_hints(TraceRequest, include_extras=True)["steps"].__metadata__
    assert (found["profile", "steps"].least, found["profile", "steps"].most) == (bounds.ge, bounds.le)
    assert all_ranges()["log.profile_steps"].most == bounds.le


def test_defaults_are_in_range():
    for _, option in numbers():
        assert option.default is None or (option.default in option.type.allowed and math.isfinite(option.default))


@pytest.mark.parametrize("part", ["0/0", "1/1", "-1/2", "nan", "inf", "1e30", "0/1e30", "0/" + "9" * 5000, "0/²", "1"])
def test_a_part_that_is_none_gets_a_line(part, capsys):
    assert main(["prepare", "tiny", f"--part={part}"]) == 2
    assert "is not K/N with K from 0 to N-1" in capsys.readouterr().err


def required_of(command: str) -> list[str]:
    """Values of the arguments that a command can't do without."""
    sub = dict(commands())[command]
    return ["x" for action in sub._actions if not action.option_strings and action.nargs not in ("*", "?")]
