"""Attempts: the starts of a stage's job, and the files that they leave behind.

A requeued job keeps its number, so an attempt is named by job and restart count. Under the stage's `attempts/`, each
rank writes a note on how it ended, `JOB_RESTART/rank_N.json`. In `history.jsonl` the batch script writes a line when an
attempt begins and another when it ends.

If ranks are restarted within the job (`launch.slurm.supervisor`), each restart begins a new generation of ranks, which
is an attempt of its own, `JOB_RESTART.GENERATION`.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from models.documents import Lines, Moment, Natural, append_lines, read_json, write_json

logger = logging.getLogger(__name__)

TOKEN = "SPRESSO_ATTEMPT"
"""Environment variable: the attempt that a process belongs to."""


class Note(TypedDict):
    """How a rank ended, which it writes into the attempt's folder, or its supervisor if it could not."""

    outcome: str
    host: str
    time: Moment
    why: NotRequired[str]
    type: NotRequired[str]
    """Class of the exception with which the rank failed."""
    message: NotRequired[str]


class HistoryEntry(TypedDict):
    """A line of the history: the beginning or the end of an attempt."""

    job: str
    restart: Natural
    generation: NotRequired[Natural]
    """Number of restarts within the job before this one; missing for the ranks of the job's start."""
    began: NotRequired[Moment]
    nodes: NotRequired[str]
    count: NotRequired[str]
    """Number of nodes."""
    ended: NotRequired[Moment]
    place: NotRequired[Natural | None]
    """How far the stage was at the end, see `begin_end.place`."""
    then: NotRequired[Literal["done", "requeued", "restarted", "over"]]
    why: NotRequired[str]
    failure: NotRequired[str]
    left_out: NotRequired[list[str]]
    """Nodes that failed the check at the start, without which the job was requeued."""
    by: NotRequired[str]


@dataclass(frozen=True)
class Attempt:
    """One start of a stage's job, or one restart of all ranks within it."""

    stage_folder: Path
    job: str
    restart: int
    generation: int = 0
    """Number of restarts within the job before this one."""

    @classmethod
    def here(cls, stage_folder: Path) -> Attempt:
        """Return the attempt that this process is part of, from SLURM's environment variables."""
        job = os.environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        return cls(stage_folder, job, int(os.environ.get("SLURM_RESTART_COUNT", "0")))

    @property
    def token(self) -> str:
        """Name of the attempt: `JOB_RESTART` or `JOB_RESTART.GENERATION`."""
        return token(self.job, self.restart, self.generation)

    @property
    def folder(self) -> Path:
        """Folder of the ranks' notes."""
        return self.stage_folder / "attempts" / self.token

    def next(self) -> Attempt:
        """Return the attempt of the next generation of ranks."""
        return replace(self, generation=self.generation + 1)

    def newest(self) -> Attempt:
        """Return the attempt of this start's newest generation that has a folder; this one if there is none."""
        found = [path.name.rpartition(".")[2] for path in self.folder.parent.glob(f"{self.job}_{self.restart}.*")]
        numbers = [int(number) for number in found if re.fullmatch(r"\d{1,9}", number)]
        return replace(self, generation=max([self.generation, *numbers]))

    def note(self, rank: int, outcome: str, **facts: Any) -> None:
        """Write how a rank ended, see `note_of`."""
        self.keep(rank, note_of(outcome, **facts))

    def keep(self, rank: int, note: Mapping[str, Any]) -> None:
        """Write a rank's note."""
        write_json(self.folder / f"rank_{rank}.json", note, indent=1)

    def notes(self) -> dict[int, dict[str, Any]]:
        """Return the notes that exist so far, by rank; one that is damaged counts as missing, with a warning."""
        found: dict[int, Any] = {}
        for path in self.folder.glob("rank_*.json"):
            if match := re.fullmatch(r"rank_(\d{1,9})\.json", path.name):
                try:
                    found[int(match[1])] = read_json(path, Note, mend="the rank counts as one without a note")
                except (ValueError, OSError) as error:
                    logger.warning("%s", error)
        return dict(sorted(found.items()))


def token(job: str, restart: int, generation: int = 0) -> str:
    """Return the name of an attempt."""
    return f"{job}_{restart}{f'.{generation}' if generation else ''}"


def note_of(outcome: str, **facts: Any) -> dict[str, Any]:
    """Return how this rank ended: done, stopped, left, idle, superseded, mistake, failed or killed."""
    return {"outcome": outcome, "host": socket.gethostname(), "time": time.time(), **facts}


def history_lines(stage_folder: Path) -> Lines[Any]:
    """Return the lines of the stage's history, each a `HistoryEntry`, oldest first; damaged ones are passed over."""
    return Lines(stage_folder / "attempts" / "history.jsonl", HistoryEntry)


def history(stage_folder: Path) -> list[dict[str, Any]]:
    """Read the lines of the stage's history, with a warning if some are damaged. Raises OSError if it can't be read."""
    lines = history_lines(stage_folder)
    read = list(lines)
    lines.require_readable()
    if lines.remark:
        logger.warning("%s", lines.remark)
    return read


def record(stage_folder: Path, entry: dict[str, Any]) -> None:
    """Append a line to the history and flush it to the disk."""
    path = stage_folder / "attempts" / "history.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    append_lines(path, [entry], durable=True)
