"""Follows a `metrics.jsonl` that a training writes: reads each line once, and keeps its curves in memory.

A training that resumes or rewinds replaces the file by one without its last lines. Of a file that was replaced or cut
off, the lines that are still the same are found by bisection over their checksums, and only the others are read.
"""

from __future__ import annotations

import math
import os
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.documents import fits, opened, parse_json
from trainer.log.trackers.events import curves_of
from trainer.run_documents import MetricsLine

MOST_ROWS = 1 << 20
"""Lines of a kind that are kept one by one. Of more, the lowest and the highest of each few are kept."""
_PIECE = 1 << 20  # bytes that are read at once
_LONGEST = 1 << 20  # bytes of a line; a longer one counts as damaged
_GENERATIONS = count(1)
_BLANK = " "  # the kind of a line without content
_LARGEST = 1e30  # a greater number, as of a run that diverges, would overflow a chart's scale


@dataclass
class Table:
    """The curves of one kind of line, a row each."""

    samples: array[int] = field(default_factory=lambda: array("q"))
    times: array[float] = field(default_factory=lambda: array("d"))
    curves: dict[str, array[float]] = field(default_factory=dict)
    """Curve → its values as float32; NaN where a line lacks it."""
    stride: int = 1
    """Lines for each of the first `merged` rows; the others stand for one line each."""
    merged: int = 0

    def add(self, samples: int, time: float, values: Mapping[str, float]) -> None:
        """Append a row."""
        rows = len(self.samples)
        for name in [name for name in values if name not in self.curves]:
            self.curves[name] = array("f", [math.nan]) * rows
        for name, column in self.curves.items():
            column.append(values.get(name, math.nan))
        self.samples.append(samples)
        self.times.append(time)
        if len(self.samples) >= MOST_ROWS:
            self._thin()

    def cut(self, rows: int) -> None:
        """Keep the first rows."""
        columns: list[array[Any]] = [self.samples, self.times, *self.curves.values()]
        for column in columns:
            del column[rows:]
        self.curves = {name: column for name, column in self.curves.items() if not np.isnan(column).all()}

    def _thin(self) -> None:
        """Merge the newest rows as the older ones were merged; if many remain, merge all of them further."""
        if self.stride > 1:
            self._merge(self.merged, self.stride)
        if len(self.samples) > MOST_ROWS // 2:
            self._merge(0, 2)
            self.stride *= 2

    def _merge(self, begin: int, size: int) -> None:
        """Let each `2 · size` rows from `begin` on become two, with the lowest and the highest value of each curve."""
        groups = (len(self.samples) - begin) // (2 * size)
        end = begin + groups * 2 * size
        places = slice(begin + size - 1, end, size)
        self.samples = self.samples[:begin] + self.samples[places] + self.samples[end:]
        self.times = self.times[:begin] + self.times[places] + self.times[end:]
        for name, column in self.curves.items():
            parts = np.array(column[begin:end], np.float32).reshape(groups, 2 * size)
            both = np.stack([np.fmin.reduce(parts, axis=1), np.fmax.reduce(parts, axis=1)], axis=1)
            self.curves[name] = column[:begin] + array("f", both.tobytes()) + column[end:]
        self.merged = begin + 2 * groups


class MetricsFile:
    """What is known of a `metrics.jsonl`; `refresh` reads on. All of it may be called from several threads.

    Attributes:
        generation: another number after lines were taken back, so that a reader of the curves begins anew.
        damaged: how many lines were passed over.
        problem: why the file can't be read now; empty if it can.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Lock()
        self.generation, self.damaged, self.problem, self.size = next(_GENERATIONS), 0, "", 0
        self._forget()

    def _forget(self) -> None:
        self.tables: dict[str, Table] = {}
        self._ends, self._sums = array("q"), array("I")  # of each line: where it ends, and its checksum
        self._kinds: list[str] = []  # of each line, empty for a damaged one
        self._identity = (0, 0)
        self.damaged = 0

    @property
    def at(self) -> int:
        """Bytes that were read, up to the end of the last whole line."""
        return self._ends[-1] if self._ends else 0

    @property
    def nbytes(self) -> int:
        """Bytes that the curves and the index take in memory, roughly."""
        rows = sum((16 + 4 * len(table.curves)) * len(table.samples) for table in list(self.tables.values()))
        return rows + 20 * len(self._ends)

    def refresh(self, *, seconds: float = math.inf) -> bool:
        """Read what is new, for at most some seconds; return whether all was read."""
        with self.lock:
            try:
                with opened(self.path) as file:
                    self._require_same(file)
                    self.problem = ""
                    return self._read_on(file, monotonic() + seconds)
            except (FileNotFoundError, NotADirectoryError):
                if self._ends:
                    self._take_back(0)
                self.size, self.problem = 0, ""
            except (OSError, ValueError) as error:
                self.problem = str(error)
            return True

    def _require_same(self, file: BinaryIO) -> None:
        """Take back the lines that the file no longer has."""
        status = os.fstat(file.fileno())
        identity, self.size = (status.st_dev, status.st_ino), status.st_size
        # the number of a removed file may be that of the next one, and the content of a file may be replaced in place
        if identity != self._identity or self.size < self.at or not self._is_there(file, len(self._ends)):
            same = self._common(file)
            if same < len(self._ends):
                self._take_back(same)
        self._identity = identity

    def _common(self, file: BinaryIO) -> int:
        """Return how many of the lines known are at the beginning of the file."""
        low, high = 0, len(self._ends)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._is_there(file, middle) else (low, middle - 1)
        return low

    def _is_there(self, file: BinaryIO, lines: int) -> bool:
        """Whether the last of so many lines is where it was."""
        if lines == 0:
            return True
        begin, end = self._ends[lines - 2] if lines > 1 else 0, self._ends[lines - 1]
        if end > self.size:
            return False
        file.seek(begin)
        return zlib.crc32(file.read(end - begin)) == self._sums[lines - 1]

    def _take_back(self, lines: int) -> None:
        self.generation = next(_GENERATIONS)
        if lines == 0 or any(table.stride > 1 for table in self.tables.values()):
            self._forget()
            return
        for column in (self._ends, self._sums, self._kinds):
            del column[lines:]
        rows = Counter(self._kinds)
        for kind, table in self.tables.items():
            table.cut(rows[kind])
        self.damaged = rows[""]

    def _read_on(self, file: BinaryIO, until: float) -> bool:
        file.seek(self.at)
        while piece := file.read(_PIECE):
            whole, separator, _ = piece.rpartition(b"\n")
            if not separator:
                if len(piece) < _PIECE:  # an incomplete last line
                    return True
                whole, separator = self._skip_long(file, piece), b"\n"
                if not whole:
                    return True
            for line in whole.split(b"\n"):
                self._add(line)
            file.seek(self.at)
            if len(piece) < _PIECE:
                return True
            if monotonic() > until:
                return False
        return True

    def _skip_long(self, file: BinaryIO, piece: bytes) -> bytes:
        """Return the rest of a line that is longer than a piece, without its break; empty if it is incomplete."""
        parts = [piece]
        while part := file.readline(_PIECE):
            parts.append(part)
            if part.endswith(b"\n"):
                return b"".join(parts)[:-1]
        return b""

    def _add(self, line: bytes) -> None:
        self._ends.append(self.at + len(line) + 1)
        self._sums.append(zlib.crc32(line + b"\n"))
        kind = ""
        try:
            kind = self._row(line)
        except (ValueError, OverflowError):
            kind = "" if line.strip() else _BLANK
            self.damaged += kind != _BLANK
        self._kinds.append(sys.intern(kind))

    def _row(self, line: bytes) -> str:
        if len(line) > _LONGEST:  # `Lines` passes over these, too
            raise ValueError("the line is too long")
        values = parse_line(line, self.path)
        kind, samples, time = values.pop("kind"), values.pop("samples"), values.pop("time", 0.0)
        self.tables.setdefault(kind, Table()).add(samples, time, _numbers(kind, values))
        return kind


def parse_line(line: bytes, path: Path) -> Any:
    """Return a line as a `MetricsLine`. Raises DamagedDocument."""
    try:
        return fits(msgspec.json.decode(line), MetricsLine, path, mend="")  # four times faster than json
    except (msgspec.DecodeError, RecursionError):  # it refuses the NaN of a loss that diverged, which json reads
        return parse_json(line, MetricsLine, path, mend="")


def _numbers(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """Return the curves of a line that have a finite value."""
    if type(values.get("loss_bins")) is not list:
        values.pop("loss_bins", None)
    found = curves_of(kind, values)
    return {name: value for name, value in found.items() if type(value) in (int, float) and abs(value) < _LARGEST}


def thinned(
    x: NDArray[np.float64], y: NDArray[np.float32], *, width: int
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Return at most `2 · width` of the points of a curve: the lowest and the highest of each part of it.

    Args:
        x: places (points,), ascending.
        y: values (points,); those that are NaN are left out.
        width: the curve's width in pixels.
    """
    known = ~np.isnan(y)
    x, y = x[known], y[known]
    if len(y) <= 2 * width:
        return x, y
    size = -(-len(y) // width)
    edge = len(y) // size * size
    parts = y[:edge].reshape(-1, size)
    begins = np.arange(len(parts)) * size
    picked = np.concatenate([begins + parts.argmin(1), begins + parts.argmax(1), [0, len(y) - 1]])
    if edge < len(y):
        picked = np.concatenate([picked, [edge + y[edge:].argmin(), edge + y[edge:].argmax()]])
    order = np.unique(picked)
    return x[order], y[order]
