"""The submitted jobs of a run: one line for each in `jobs.jsonl` of the run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_FILE = "jobs.jsonl"


@dataclass(frozen=True)
class Submitted:
    """A job that was submitted."""

    stage: str
    """Stage that the job runs."""
    job: str
    submission: str
    log: str
    time: float


def keep(root: Path, jobs: Sequence[Submitted]) -> None:
    """Append jobs, each of which becomes the last job of its stage."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / _FILE).open("a") as file:
        file.writelines(json.dumps(asdict(job)) + "\n" for job in jobs)


def submitted(root: Path) -> dict[str, Submitted]:
    """Return the last job of each stage. Raises ValueError, TypeError if a line is damaged."""
    path, found = root / _FILE, {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        item = Submitted(**json.loads(line))
        found[item.stage] = item
    return found
