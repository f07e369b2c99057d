"""How the points and shared stages of a sweep ended on this machine: a line for each in `outcomes.jsonl`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from models.documents import Lines, Moment, append_lines

_FILE = "outcomes.jsonl"
DONE, STOPPED, FAILED = "done", "stopped", "failed"


class Outcome(TypedDict):
    """A line of the file."""

    part: str
    """The run directory of a point or a shared stage, below the sweep's."""
    outcome: Literal["done", "stopped", "failed"]
    time: Moment
    why: NotRequired[str]


def append(sweep: Path, part: str, outcome: str, why: str = "") -> None:
    """Add how a part has ended."""
    entry = {"part": part, "outcome": outcome, "time": time.time()}
    append_lines(sweep / _FILE, [entry | ({"why": why} if why else {})])


def latest(sweep: Path) -> dict[str, Outcome]:
    """Return how each part ended last; damaged lines are passed over."""
    return {line["part"]: line for line in Lines(sweep / _FILE, Outcome)}
