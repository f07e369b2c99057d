"""The starts of a stage's job: who holds the run directory, what each rank left behind, and what came of it.

A job that is requeued keeps its number; its restarts tell its starts apart. What a start leaves behind lies under the
stage's `attempts/`: a note of each rank, `JOB_RESTART/rank_N.json`, and in `history.jsonl` a line for each start.
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
"""Environment variable: which start a process belongs to."""


@dataclass(frozen=True)
class Attempt:
    """One start of a stage's job."""

    stage_folder: Path
    job: str
    restart: int

    @classmethod
    def here(cls, stage_folder: Path) -> Attempt:
        """The one that this process is part of, by SLURM's environment."""
        job = os.environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        return cls(stage_folder, job, int(os.environ.get("SLURM_RESTART_COUNT", "0")))

    @property
    def token(self) -> str:
        """Its name."""
        return f"{self.job}_{self.restart}"

    @property
    def folder(self) -> Path:
        """Where its ranks leave their notes."""
        return self.stage_folder / "attempts" / self.token

    def note(self, rank: int, outcome: str, **facts: Any) -> None:
        """Leave a note of how a rank ended: done, stopped, left, idle, mistake or failed."""
        entry = {"outcome": outcome, "host": socket.gethostname(), "time": time.time(), **facts}
        write_whole(self.folder / f"rank_{rank}.json", json.dumps(entry, indent=1))

    def notes(self) -> dict[int, dict[str, Any]]:
        """The ranks' notes so far."""
        found = {}
        for path in self.folder.glob("rank_*.json"):
            found[int(path.stem.removeprefix("rank_"))] = json.loads(path.read_text("utf-8"))
        return dict(sorted(found.items()))


def history(stage_folder: Path) -> list[dict[str, Any]]:
    """What came of the stage's starts, oldest first; a torn line is passed over."""
    path = stage_folder / "attempts" / "history.jsonl"
    lines = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def record(stage_folder: Path, entry: dict[str, Any]) -> None:
    """Add a line to the history; on the disk when this returns."""
    path = stage_folder / "attempts" / "history.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())
