"""`sweep.json`: the points of a sweep, and where the stages lie that they share.

A sweep's directory:

    sweep.json               this record
    points/NAME/             a run directory for each point; a stage that it shares is a link
    shared/STAGE-HASH/       a run directory for each shared stage
    outcomes.jsonl           how points and shared stages ended on this machine
    submissions/N/  logs/    on SLURM: code and configs of the jobs, and the output of their scripts
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.documents import Positive, damaged, read_json, write_json

FILE = "sweep.json"
POINTS, SHARED = "points", "shared"
FORMAT = 1
"""Version of the record."""
_MEND = "restore it, take another --dir, or remove it to begin anew in an empty directory"


@dataclass(frozen=True)
class RecordedPoint:
    """A point of a sweep."""

    name: str
    """Name of its run directory in `points/`."""
    settings: dict[str, str]
    """What differs, as it was typed, by dotted keys."""
    stages: dict[str, str] = field(default_factory=dict)
    """Each stage that lies outside of its run directory → the run directory in which it lies, below the sweep's."""

    @property
    def folder(self) -> str:
        """Its run directory, below the sweep's."""
        return f"{POINTS}/{self.name}"

    def folder_of(self, stage: str) -> str:
        """Return the run directory in which a stage of the point lies, below the sweep's."""
        return self.stages.get(stage, self.folder)


@dataclass(frozen=True)
class Record:
    """The content of `sweep.json`."""

    format: int
    name: str
    """Name of the recipe."""
    recipe: str
    """The recipe as it was given, by name or path."""
    keys: list[str]
    """The keys that differ within the sweep."""
    points: list[RecordedPoint]
    at_once: Positive | None = None
    """Number of points that run at the same time on SLURM; None: any."""

    @property
    def shared(self) -> dict[tuple[str, str], list[str]]:
        """The shared stages: (run directory below the sweep's, stage) → the names of the points that use it."""
        found: dict[tuple[str, str], list[str]] = {}
        for point in self.points:
            for stage, folder in point.stages.items():
                found.setdefault((folder, stage), []).append(point.name)
        return found


def is_sweep(folder: Path) -> bool:
    """Whether a directory is a sweep's."""
    try:
        return (folder / FILE).is_file()
    except OSError:  # nobody may look into it
        return False


def read(folder: Path) -> Record | None:
    """Read the record of a sweep; None if there is none.

    Raises:
        ValueError: the record is damaged, or a newer version wrote it.
        OSError: it can't be read.
    """
    path = folder / FILE
    try:
        content: Any = read_json(path, dict[str, Any], mend=_MEND)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if isinstance(number := content.get("format"), int) and number > FORMAT:
        raise ValueError(f"{path} was written by a newer version (format {number}): update this one")
    record = read_json(path, Record, mend=_MEND)
    for point in record.points:
        for inner in (point.folder, *point.stages.values()):
            if ".." in Path(inner).parts or Path(inner).is_absolute() or len(Path(inner).parts) != 2:
                raise damaged(path, f"`points`: {inner!r} is no run directory of the sweep", _MEND)
    return record


def write(folder: Path, record: Record) -> None:
    """Write the record of a sweep, which appears whole or not at all."""
    write_json(folder / FILE, record, indent=1, ascii=False, end="\n")
