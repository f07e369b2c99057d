"""Attempts: the starts of a stage's job, and the files that they leave behind.

A requeued job keeps its number, so an attempt is named by job and restart count. Under the stage's `attempts/`, each
rank writes a note on how it ended, `JOB_RESTART/rank_N.json`. In `history.jsonl` the batch script writes a line when an
attempt begins and another when it ends.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.atomic_write import write_whole

TOKEN = "SPRESSO_ATTEMPT"
"""Environment variable: the attempt that a process belongs to."""


@dataclass(frozen=True)
class Attempt:
    """One start of a stage's job."""

    stage_folder: Path
    job: str
    restart: int

    @classmethod
    def here(cls, stage_folder: Path) -> Attempt:
        """Return the attempt that this process is part of, from SLURM's environment variables."""
        job = os.environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        return cls(stage_folder, job, int(os.environ.get("SLURM_RESTART_COUNT", "0")))

    @property
    def token(self) -> str:
        """Name of the attempt: `JOB_RESTART`."""
        return f"{self.job}_{self.restart}"

    @property
    def folder(self) -> Path:
        """Folder of the ranks' notes."""
        return self.stage_folder / "attempts" / self.token

    def note(self, rank: int, outcome: str, **facts: Any) -> None:
        """Write how a rank ended: done, stopped, left, idle, superseded, mistake or failed."""
        entry = {"outcome": outcome, "host": socket.gethostname(), "time": time.time(), **facts}
        write_whole(self.folder / f"rank_{rank}.json", json.dumps(entry, indent=1))

    def notes(self) -> dict[int, dict[str, Any]]:
        """Return the notes that exist so far, by rank."""
        found = {}
        for path in self.folder.glob("rank_*.json"):
            found[int(path.stem.removeprefix("rank_"))] = json.loads(path.read_text("utf-8"))
        return dict(sorted(found.items()))


def history(stage_folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the stage's history, oldest first; incomplete lines are skipped."""
    path = stage_folder / "attempts" / "history.jsonl"
    lines = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def record(stage_folder: Path, entry: dict[str, Any]) -> None:
    """Append a line to the history and flush it to the disk."""
    path = stage_folder / "attempts" / "history.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())
