"""The jobs that a run was handed over as: a line for each in the run directory's `jobs.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_FILE = "jobs.jsonl"


@dataclass(frozen=True)
class Submitted:
    """A job that was handed over."""

    stage: str
    """Or several, with commas."""
    job: str
    submission: str
    log: str
    time: float


def keep(root: Path, jobs: Sequence[Submitted]) -> None:
    """Add them, as the last of their stages."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / _FILE).open("a") as file:
        file.writelines(json.dumps(asdict(job)) + "\n" for job in jobs)


def submitted(root: Path) -> dict[str, Submitted]:
    """The last job of each stage."""
    path, found = root / _FILE, {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        item = Submitted(**json.loads(line))
        found[item.stage] = item
    return found
