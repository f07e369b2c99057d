"""The submitted jobs of a run: one line for each in `jobs.jsonl` of the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.documents import Lines, Moment, append_lines, damaged

_FILE = "jobs.jsonl"


@dataclass(frozen=True)
class Submitted:
    """A job that was submitted."""

    stage: str
    """Stage that the job runs."""
    job: str
    submission: str
    log: str
    time: Moment


def keep(root: Path, jobs: Sequence[Submitted]) -> None:
    """Append jobs, each of which becomes the last job of its stage."""
    root.mkdir(parents=True, exist_ok=True)
    append_lines(root / _FILE, jobs)


def submitted(root: Path) -> dict[str, Submitted]:
    """Return the last job of each stage.

    Raises:
        ValueError: a line is damaged, which may name a job that runs.
        OSError: the file can't be read.
    """
    lines = Lines(root / _FILE, Submitted)
    found = {item.stage: item for item in lines}
    lines.require_readable()
    if lines.problem or lines.damaged:
        raise damaged(root / _FILE, lines.problem or lines.first, "repair or remove the line")
    return found


def undamaged(root: Path) -> dict[str, Submitted]:
    """Return the last job of each stage by the undamaged lines. Raises OSError if the file can't be read."""
    lines = Lines(root / _FILE, Submitted)
    found = {item.stage: item for item in lines}
    lines.require_readable()
    return found
