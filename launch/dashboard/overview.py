"""The rows of the overview: one for each run, read within a time that is told, the rest at the next call."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from launch.dashboard.found_runs import found_runs
from launch.dashboard.metrics_file import parse_line
from launch.error_line import describe_error
from launch.status import table
from launch.status.kept_stages import KeptStages
from launch.status.queue_watch import QueueWatch
from launch.status.stage_status import StageStatus
from models.documents import opened

_ACTIVE = {"running", "running?", "pending", "requeued", "submitted"}
_FRESH = {True: 1.0, False: 15.0}  # seconds until a run is looked at again, by whether it is active
_SCAN = 5.0  # seconds until the folder is looked through again
_POINTS, _PIECE = 40, 8192  # of a sparkline: points, and bytes in which each is searched


@dataclass
class _Kept:
    """A run as it was looked at last."""

    path: Path
    row: dict[str, Any] = field(default_factory=dict)
    stages: list[StageStatus] = field(default_factory=list)
    at: float = -math.inf
    spark: tuple[tuple[Any, ...], list[float]] | None = None

    @property
    def is_active(self) -> bool:
        return self.row.get("state") in _ACTIVE


class Overview:
    """What is known of all runs in a folder. Its methods may be called from several threads."""

    def __init__(self, folder: Path, queue: QueueWatch | None = None) -> None:
        self.folder, self.queue, self.reader = folder, queue or QueueWatch(patience=0.0), KeptStages()
        self._lock, self._kept, self._scanned = Lock(), dict[str, _Kept](), -math.inf
        self._problems: list[str] = []

    def path(self, name: str) -> Path | None:
        """Return the directory of a run; None if there is no run of this name."""
        with self._lock:
            self._scan()
            return self._kept[name].path if name in self._kept else None

    def stages(self, name: str) -> list[StageStatus]:
        """Return the stages of a run as they are now. Raises KeyError, ValueError or OSError."""
        with self._lock:
            kept = self._kept[name]
            kept.stages = self.reader.stages_of(kept.path)
            self._ask()
            # another answer may look at the run again and have its states found out anew, while the caller reads these
            return [copy(stage) for stage in kept.stages]

    def rows(self, *, seconds: float) -> dict[str, Any]:
        """Return the rows of all runs, the last problems, and how many runs could not be read yet.

        Args:
            seconds: time after which the other runs keep their last row, or get one without content.
        """
        with self._lock:
            self._scan()
            until, now = time.monotonic() + seconds, time.monotonic()
            due = [each for each in self._kept.values() if now - each.at >= _FRESH[each.is_active]]
            # those that nobody has seen yet, then those that run, then those that wait longest
            for kept in sorted(due, key=lambda each: (bool(each.row), not each.is_active, each.at)):
                if time.monotonic() > until:
                    break
                self._look(kept)
            problem = self._ask()
            for kept in self._kept.values():
                if kept.is_active:
                    kept.row |= _summary(kept.stages)
            told = [*self._problems, *([f"from the run directories alone: {problem}"] if problem else [])]
            return {
                "time": time.time(),
                "folder": str(self.folder),
                "runs": [{"name": name, **kept.row} for name, kept in self._kept.items()],
                "missing": sum(not kept.row for kept in self._kept.values()),
                "problems": told,
            }

    def _scan(self) -> None:
        if time.monotonic() - self._scanned < _SCAN:
            return
        found, self._problems = found_runs(self.folder)
        self._kept = {name: self._kept.get(name) or _Kept(path) for name, path in found.items()}
        self._scanned = time.monotonic()

    def _ask(self) -> str:
        every = [stage for kept in self._kept.values() for stage in kept.stages if not stage.over]
        for stage in every:
            for name in ("state", "parts"):  # they follow from the queue's answer
                vars(stage).pop(name, None)
        return self.queue.fill(every)

    def _look(self, kept: _Kept) -> None:
        try:
            kept.stages = self.reader.stages_of(kept.path)
            kept.row = _summary(kept.stages)
            kept.row["spark"] = self._spark(kept)
        except (ValueError, OSError) as error:
            kept.stages, kept.row = [], {"state": "unreadable", "problem": describe_error(error)}
        kept.at = time.monotonic()

    def _spark(self, kept: _Kept) -> list[float]:
        stage = current(kept.stages)
        path = (stage.folder if stage else kept.path) / "metrics.jsonl"
        try:
            status = path.stat()
        except OSError:
            return []
        key = (path, status.st_ino, status.st_size, status.st_mtime_ns)
        if kept.spark is None or kept.spark[0] != key:
            kept.spark = (key, sparkline(path))
        return kept.spark[1]


def current(stages: Sequence[StageStatus]) -> StageStatus | None:
    """Return the stage to show of a run: the last one that runs or waits, or else the last that has begun."""
    living = [stage for stage in stages if stage.runs]
    waiting = [stage for stage in stages if stage.state in _ACTIVE]
    logged = [stage for stage in stages if stage.line]
    return next((group[-1] for group in (living, waiting[:1], logged, stages) if group), None)


def figures(stage: StageStatus, before: Sequence[StageStatus]) -> dict[str, Any]:
    """Return what is shown of a stage: state, progress, expected end and the figures of its last line."""
    status, line, parts = stage.status, stage.line, stage.parts
    return {
        "stage": stage.folder.name,
        "state": stage.state,
        "samples": parts["done"] if parts else status.get("samples"),
        "of": sum(parts.values()) if parts else status.get("of"),
        "unit": "parts" if parts else "samples",
        "expected": table.expected_end(stage, before),
        **{key: number(line.get(key)) for key in ("time", "loss", "samples_per_second", "mfu", "tflops")},
    }


def number(value: Any) -> float | None:
    """Return a finite number as JSON can hold it; None for anything else."""
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _summary(stages: Sequence[StageStatus]) -> dict[str, Any]:
    stage = current(stages)
    if stage is None:
        return {"state": "submitted"}
    return {
        **figures(stage, stages[: stages.index(stage)]),
        "done": sum(each.state == "done" for each in stages),
        "stages": len(stages),
        "remarks": list(table.remarks(stage))[:3],
    }


def sparkline(path: Path) -> list[float]:
    """Return the losses of about `_POINTS` lines that are spread evenly over a metrics.jsonl, reading only these."""
    try:
        with opened(path) as file:
            pieces = _pieces(file, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError):
        return []
    found = {}
    newest_first = [line for piece in pieces[:-3:-1] for line in reversed(piece)]  # for the very last point
    for lines in [*pieces, newest_first]:
        point = next((point for line in lines if (point := _point(line, path)) is not None), None)
        if point is not None:
            found[point[0]] = point[1]
    return [found[samples] for samples in sorted(found)]


def _pieces(file: BinaryIO, size: int) -> list[list[bytes]]:
    """Return the lines of a file in about `_POINTS` parts; of a large one, some lines at the beginning of each part."""
    if size <= _POINTS * _PIECE:
        lines = file.read().split(b"\n")
        each = -(-len(lines) // _POINTS)
        return [lines[begin : begin + each] for begin in range(0, len(lines), each)]
    pieces = []
    for part in range(_POINTS + 1):
        file.seek((size - _PIECE) * part // _POINTS)
        pieces.append(file.read(_PIECE).split(b"\n")[1 if part else 0 :])
    return pieces


def _point(line: bytes, path: Path) -> tuple[int, float] | None:
    """Return samples and loss of a line of the training; None for any other line."""
    try:
        values: Mapping[str, Any] = parse_line(line, path)
    except ValueError:
        return None
    loss = number(values.get("loss"))
    return (values["samples"], loss) if values["kind"] == "train" and loss is not None else None
