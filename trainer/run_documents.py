"""The documents of a stage's run directory that are JSON: their types, and how they are read.

Importing this module needs no torch, so that `spresso status` answers at once.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from models.documents import LARGEST, Lines, Moment, Natural, read_json

logger = logging.getLogger(__name__)

UPLOAD = "upload.json"
"""File in a stage's directory: how far its upload to a store is, see `UploadState`."""


class TriedAverage(TypedDict):
    """An average whose held-out loss was measured after training."""

    width: float
    """Relative width σ_rel of its profile."""
    error: float
    """How far the profile is from the exact one, see `checkpoints.profiles.Combination`."""
    loss: float | None


class Status(TypedDict):
    """The content of `status.json`."""

    stage: NotRequired[str]
    state: NotRequired[str]
    """running, stopped or done."""
    time: NotRequired[str]
    samples: NotRequired[Natural]
    of: NotRequired[Natural]
    loss: NotRequired[float | None]
    save_seconds: NotRequired[float]
    doing: NotRequired[str]
    """Long work beside the steps, and how far it is."""
    warnings: NotRequired[list[str]]
    """What the user should know of the stage; kept until the stage begins anew."""
    export: NotRequired[str]
    """Hash of the export, once the stage is done."""
    files: NotRequired[list[str]]
    """Names of the export's files, likewise."""
    averages: NotRequired[list[TriedAverage]]
    """The widths of averages that were tried after training, if the stage keeps profiles."""
    average: NotRequired[float]
    """The width that was exported, likewise."""


class UploadState(TypedDict):
    """The content of `upload.json`."""

    url: str
    time: Moment
    sending: NotRequired[str]
    """What is on its way; nothing is if the field is missing."""
    sent: NotRequired[Natural]
    """Bytes of it that have gone."""
    of: NotRequired[Natural]
    """Bytes that it has."""
    whole: NotRequired[str]
    """Newest checkpoint that is whole on the store, or `export`."""
    problem: NotRequired[str]
    """What failed last, if nothing has succeeded since."""
    damaged: NotRequired[list[str]]
    """Checkpoints on the store that a download has found damaged."""


class MetricsLine(TypedDict):
    """A line of `metrics.jsonl`, without the fields that nothing reads."""

    kind: str
    """train, held_out, or average for the averages that are tried after training."""
    samples: Natural
    time: NotRequired[Moment]
    loss: NotRequired[float | None]
    loss_ema: NotRequired[float | None]
    loss_bins: NotRequired[list[float | None] | None]
    samples_per_second: NotRequired[float | None]
    z_rank: NotRequired[Natural | None]


class Incident(TypedDict):
    """An entry of `incident.json`."""

    what: str
    position: int


def read_optional(path: Path, kind: Any, *, mend: str, most: int = LARGEST) -> Any:
    """Read a JSON document as `models.documents.read_json` does; None if it is missing."""
    try:
        return read_json(path, kind, mend=mend, most=most)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_upload(folder: Path) -> dict[str, Any]:
    """Read a stage's `upload.json`, see `UploadState`; empty if there is none. Raises ValueError if it is damaged."""
    return read_optional(folder / UPLOAD, UploadState, mend="remove it; the next upload writes it again") or {}


def read_status(folder: Path) -> dict[str, Any]:
    """Read a stage's `status.json`, see `Status`; empty if there is none. Raises ValueError if it is damaged."""
    return read_optional(folder / "status.json", Status, mend="remove it, and run the stage again") or {}


def metrics_lines(path: Path) -> Lines[Any]:
    """Return the lines of a `metrics.jsonl`, each a `MetricsLine`; damaged ones are passed over and counted."""
    return Lines(path, MetricsLine)


def warn_of(lines: Lines[Any]) -> None:
    """Log a warning if lines that were read were damaged."""
    if lines.remark:
        logger.warning("%s", lines.remark)
