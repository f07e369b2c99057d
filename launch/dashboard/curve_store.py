"""The curves of all stages that pages follow, within a bound of memory, and what a page lacks of them."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from launch.dashboard.metrics_file import MetricsFile, Table, thinned

MOST_BYTES = 512 << 20
"""Bytes of curves in memory. Beyond that, the file that was asked for longest ago is forgotten."""
_READING = 0.5  # seconds of reading for an answer; a page shows how far a long file is
_GAP = 60.0, 8.0  # a gap in time is longer than this many seconds, and than this many times the usual distance of lines
_MOST_GAPS = 200


class CurveStore:
    """Answers what a page lacks of the curves of a stage. `answer` may be called from several threads."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._files: OrderedDict[Path, MetricsFile] = OrderedDict()
        self._lock, self.most_bytes = Lock(), most_bytes

    def answer(
        self, path: Path, *, since: str = "", width: int = 600, low: float = -math.inf, high: float = math.inf
    ) -> dict[str, Any]:
        """Return the curves of a metrics.jsonl between two numbers of samples, thinned to a width in pixels.

        Args:
            path: the metrics.jsonl.
            since: `token` of an earlier answer with the same bounds: only later rows are returned, with
                `"whole": false`, unless lines were taken back since, or there are many.
            width: pixels of a chart.
            low: samples at the left edge.
            high: samples at the right edge.
        """
        file = self._file(path)
        done = file.refresh(seconds=_READING)
        with file.lock:
            rows = {kind: len(table.samples) for kind, table in file.tables.items()}
            merged = sum(table.stride - 1 for table in file.tables.values())
            state = f"{file.generation}.{merged}"
            before = _rows_before(since, state)
            later = before is not None and sum(rows.values()) - sum(before.values()) <= 2 * width
            begin = before if later and before is not None else {}
            kinds = {kind: _curves(table, begin.get(kind, 0), width, low, high) for kind, table in file.tables.items()}
            counts = ",".join(f"{kind}={count}" for kind, count in rows.items())
            return {
                "token": f"{state}:{counts}",
                "whole": not later,
                "read": [file.at, max(file.size, file.at)] if not done else None,
                "damaged": file.damaged,
                "problem": file.problem,
                "kinds": kinds,
                "gaps": _gaps(file.tables.get("train")),
            }

    def _file(self, path: Path) -> MetricsFile:
        """Return what is known of a file, which becomes the one that was asked for last; forget old ones."""
        with self._lock:
            file = self._files.setdefault(path, MetricsFile(path))
            self._files.move_to_end(path)
            while len(self._files) > 1 and sum(each.nbytes for each in self._files.values()) > self.most_bytes:
                self._files.popitem(last=False)
            return file


def _rows_before(since: str, state: str) -> dict[str, int] | None:
    """Return the rows of each kind that the page has; None if it has to begin anew."""
    head, _, tail = since.rpartition(":")
    if head != state:
        return None
    counts = [part.rpartition("=") for part in tail.split(",") if part]
    return {kind: int(count) for kind, _, count in counts if count.isascii() and count.isdigit()}


def _curves(table: Table, begin: int, width: int, low: float, high: float) -> dict[str, Any]:
    """Return the points of each curve from a row on; one point beyond each bound is kept, so that lines go on."""
    samples = np.array(table.samples[begin:], np.float64)
    first = max(0, int(np.searchsorted(samples, low)) - 1)
    last = min(len(samples), int(np.searchsorted(samples, high, side="right")) + 1)
    found = {}
    for name, column in table.curves.items():
        x, y = thinned(samples[first:last], np.array(column[begin + first : begin + last], np.float32), width=width)
        if len(x):
            found[name] = {"x": x.astype(np.int64).tolist(), "y": [float(f"{value:.6g}") for value in y]}
    return found


def _gaps(table: Table | None) -> list[dict[str, float]]:
    """Return where the lines of a training lie further apart in time than usual: samples, and seconds in between."""
    if table is None or len(table.times) < 3:
        return []
    steps = np.diff(np.array(table.times, np.float64))
    known = steps[steps > 0]
    if not len(known):
        return []
    places = np.flatnonzero(steps > max(_GAP[0], _GAP[1] * float(np.median(known))))[-_MOST_GAPS:]
    return [{"samples": table.samples[place], "seconds": round(float(steps[place]), 1)} for place in places.tolist()]
