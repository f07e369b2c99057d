"""State of a stage of a run, from the stage's directory and the queue."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from launch import owner
from launch.slurm import attempt
from launch.slurm.requeue_policy import DONE, OVER, REQUEUE
from launch.slurm.scheduler import JobState, elements_of
from launch.slurm.submitted_jobs import Submitted
from models.documents import Lines, read_bytes
from trainer.exported import missing_export
from trainer.run_documents import metrics_lines, read_status

SILENT_AFTER = 900.0
"""Seconds without a new line after which a training that claims to run may not be running."""

_TAIL = 65_536  # bytes at the end of a metrics.jsonl that hold its last lines
_OUTCOMES = {DONE: "done", OVER: "failed", REQUEUE: "pending"}
# the state of an array is the last of these that one of its parts has
_WORST_LAST = ("done", "gone", "cancelled", "failed", "pending", "running")
_ENDS = {"COMPLETED": "done", "FAILED": "failed", "GONE": "gone"}


@dataclass
class StageStatus:
    """State of a stage. Each file is read on first use and then cached."""

    folder: Path
    job: Submitted | None
    """Last job that was submitted for the stage."""
    elements: list[JobState] = field(default_factory=list)
    """States of the job in SLURM, several for an array; empty if SLURM was not queried or did not answer."""

    @property
    def begun(self) -> bool:
        """Whether the stage has left any file."""
        names = ("status.json", "owner.json", "config.yaml", "attempts/history.jsonl")
        return any((self.folder / name).exists() for name in names)

    @cached_property
    def status(self) -> dict[str, Any]:
        """Content of status.json, which the training writes; empty if there is none, or it is damaged."""
        return self._status[0]

    @cached_property
    def _status(self) -> tuple[dict[str, Any], str]:
        try:
            return read_status(self.folder), ""
        except (OSError, ValueError) as error:
            return {}, str(error)

    @cached_property
    def missing_export(self) -> str:
        """What is missing of the export of a stage that was done, and the mend; empty if nothing is missing."""
        return missing_export(self.folder, self.status)

    @cached_property
    def line(self) -> dict[str, Any]:
        """Last undamaged `train` line of metrics.jsonl; empty if there is none."""
        return last_line(self.folder / "metrics.jsonl")

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """Lines on the starts of the stage's jobs, which `launch.slurm.begin_end` writes, oldest first."""
        return list(self._history)

    @cached_property
    def _history(self) -> Lines[Any]:
        return attempt.history_lines(self.folder)

    @cached_property
    def _held(self) -> tuple[owner.Owner | None, str]:
        try:
            return owner.holder(self.folder), ""
        except (ValueError, OSError) as error:
            return None, str(error)

    @property
    def holder(self) -> owner.Owner | None:
        """Owner of the stage's directory."""
        return self._held[0]

    @property
    def damaged(self) -> list[str]:
        """Descriptions of the damaged files, for people."""
        assert self.history is not None  # it counts the damaged lines as it is read
        return [problem for problem in (self._held[1], self._status[1], self._history.remark) if problem]

    @property
    def living(self) -> list[JobState]:
        """Living parts of the job: those that run, or will run by themselves."""
        return [element for element in self.elements if element.alive]

    @property
    def by_hand(self) -> str:
        """Process that trains the stage without SLURM, dead or alive; empty if there is none, or if a job is alive."""
        return self.holder.told if self.holder is not None and not self.holder.job and not self.living else ""

    @cached_property
    def _alive_by_hand(self) -> bool:
        # not for an owner that is a job: `lives` would query SLURM again for each stage
        return self.holder is not None and not self.holder.job and owner.lives(self.holder, self.folder)

    @property
    def over(self) -> bool:
        """Whether the job's own script has recorded that the job is done or over."""
        return not self.array and self.of_this_job[-1:] != [] and self.of_this_job[-1].get("then") in (DONE, OVER)

    @property
    def of_this_job(self) -> list[dict[str, Any]]:
        """Lines of the history on the last job; all lines if no job was submitted."""
        return [
            line
            for line in self.history
            if self.job is None or self.job.job in (line["job"], line["job"].partition("_")[0])
        ]

    @property
    def array(self) -> bool:
        """Whether the job is an array. One element of an array, which runs a point of a sweep, is none."""
        numbers = [*(line["job"] for line in self.of_this_job), *(element.job for element in self.elements)]
        if self.job is None or "_" in self.job.job:
            return False
        return "%a" in Path(self.job.log).name or any("_" in number for number in numbers)

    def _written(self, *names: str) -> float:
        """Return when the newest of some files was written, in seconds since the epoch; 0 if none exists."""
        paths = [self.folder / name for name in names]
        return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)

    @property
    def spoke(self) -> float:
        """Time of the last sign of life, in seconds since the epoch."""
        return self._written("status.json", "owner.json", "attempts/history.jsonl")

    @property
    def runs(self) -> bool:
        """Whether the stage runs, or probably runs."""
        return self.state in ("running", "running?")

    @property
    def speaks(self) -> bool:
        """Whether the stage has logged a line since it started, which gives its speed."""
        return self.runs and self.line.get("time", -1.0) >= self._written("owner.json")

    @cached_property
    def state(self) -> str:
        """State in one word. `running?` and `silent` are guesses from the time of the last sign of life."""
        if self.missing_export and not self.living and not self._alive_by_hand:
            return "no export"
        saved, last = self.status.get("state"), (self.of_this_job or [{}])[-1]
        if self.by_hand:
            return "running" if self._alive_by_hand else "done" if saved == "done" else "died"
        if parts := self.parts:
            return next(kind for kind in _WORST_LAST[::-1] if parts[kind])
        if self.over:
            return _OUTCOMES[last["then"]]
        if self._comes_later:
            return "pending"
        if self.elements and self.elements[0].state != "GONE":
            return _ENDS.get(self.elements[0].state, self.elements[0].state.lower())
        if not self.elements and last.get("then") == REQUEUE:
            return "requeued"
        if saved in ("done", "stopped") and (self.elements or self._written("status.json") >= last.get("began", 0.0)):
            return saved
        if self.elements:
            return "gone"
        if self.job is not None and not last:
            return "submitted"
        return "running?" if time.time() - self.spoke < SILENT_AFTER else "silent"

    @property
    def _comes_later(self) -> bool:
        """Whether the job runs an earlier stage of a point of a sweep, whose stages are one job."""
        runs = any(element.state == "RUNNING" for element in self.elements)
        return runs and self.job is not None and "_" in self.job.job and not self.of_this_job

    @cached_property
    def parts(self) -> Counter[str]:
        """Number of an array's parts that are done, failed, running, pending, cancelled or gone; else empty."""
        if self.job is None or not self.array:
            return Counter()
        known = {}
        for line in self.of_this_job:
            known[line["job"].partition("_")[2]] = _OUTCOMES.get(line.get("then", ""), "running")
        if self.elements:  # SLURM knows better which parts are alive
            known = {part: kind if kind in ("done", "failed") else "gone" for part, kind in known.items()}
        for element in self.elements:
            kind = _ENDS.get(element.state, "cancelled")
            if element.alive:
                kind = "pending" if element.state == "PENDING" else "running"
            known |= {part: kind for part in elements_of(element.job) if element.alive or known.get(part) != "failed"}
        cancelled = any(element.state == "CANCELLED" and not elements_of(element.job) for element in self.elements)
        rest = "pending" if self.living or not self.elements else "cancelled" if cancelled else "gone"
        counted = Counter(dict.fromkeys(_WORST_LAST, 0))
        counted.update(known.values())
        counted[rest] += max(0, self._size - len(known))
        return counted

    @property
    def _size(self) -> int:
        """Number of parts of an array, read from its script: SLURM forgets ended parts and truncates long lists."""
        assert self.job is not None
        path = Path(self.job.submission) / "jobs" / f"{self.job.job}_submission.sh"
        try:
            match = re.search(rb"^#SBATCH --array=0-(\d{1,9})\b", read_bytes(path, mend=""), re.MULTILINE)
        except (ValueError, OSError):
            return 0
        return int(match[1]) + 1 if match else 0


def last_line(path: Path) -> dict[str, Any]:
    """Return the last complete `train` line of a metrics.jsonl, reading only its end; empty if there is none."""
    last: dict[str, Any] = {}
    for _, line in metrics_lines(path).pairs(tail=_TAIL):
        if line["kind"] == "train" and "time" in line:
            last = line
    return last


def count(number: int) -> str:
    """Format a number as `2,000,000`."""
    return f"{number:,}"


def span(seconds: float) -> str:
    """Format a duration as `40 s`, `12 min`, `3 h` or `4 days`."""
    for unit, size, until in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds / size < until:
            return f"{max(0.0, seconds) / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
