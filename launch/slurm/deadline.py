"""A job's notice to leave: what a signal means, and until when there is time.

SLURM says SIGUSR2 before the time limit (and, where the cluster is set so, before a preemption) and SIGTERM for
anything else. What it means and the true deadline are the controller's to tell. A thread that the interpreter's own C
handler wakes (`signal.set_wakeup_fd`) asks it, as a rank that hangs in a collective runs no handler of Python's; and it
leaves for such a rank before the cluster kills it, so that the batch script is alive to requeue the job.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import NoReturn, Self

from launch.signals import StopFlag
from launch.slurm import scheduler

_KILL_WAIT = 30.0  # seconds: SLURM's default between SIGTERM and SIGKILL
_LAST_STEP = 10.0  # seconds for a step under way, where a rank has died and no step can end any more
_FOR_THE_SCRIPT = 10.0  # seconds that the batch script needs to requeue the job
_SLACK = 90.0  # seconds: SLURM says a time limit up to a minute early


@dataclass(frozen=True)
class Meaning:
    """Of a signal."""

    why: str
    seconds: float
    """From the signal on until this rank has to be gone."""


def meaning(number: int, job: dict[str, str], *, now: float, grace: float, kill_wait: float) -> Meaning:
    """What a signal means, by what the controller says of the job (empty: it gave no answer)."""
    end = _time(job.get("EndTime", ""))
    left = grace if end is None else end - now
    usable = left - min(_FOR_THE_SCRIPT, 0.25 * max(0.0, left))
    asked = number == signal.SIGUSR2
    if not job:
        return Meaning("a signal from SLURM, whose controller does not answer", 0.8 * (grace if asked else kill_wait))
    if job.get("JobState") in ("COMPLETING", "CANCELLED"):
        return Meaning("was cancelled", 0.8 * kill_wait)
    if _time(job.get("PreemptTime", "")) is not None:
        return Meaning("was preempted", usable if left > 1 else 0.8 * kill_wait)
    if asked:
        return Meaning("the time limit is near" if left < grace + _SLACK else "was asked to come back later", usable)
    return Meaning("was told to end, or another rank died", min(0.8 * kill_wait, _LAST_STEP))


class Notice(StopFlag):
    """The StopFlag of a job's rank."""

    def __init__(self, job: str, *, grace: float, leave: Callable[[str], NoReturn], at_once: bool = False) -> None:
        """`leave` ends the process where the loop does not, in time; `at_once`: without waiting for a loop."""
        super().__init__()
        self.job, self.grace, self.leave, self.at_once = job, grace, leave, at_once
        self._gone_by = float("inf")

    def hurried(self, seconds: float) -> bool:
        """Whether something that takes so long does not fit into what is left."""
        return time.monotonic() + seconds > self._gone_by

    def __enter__(self) -> Self:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._watch, args=(reader,), name="notice", daemon=True).start()
        super().__enter__()
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writer)
        super().__exit__(kind, error, traceback)

    def _watch(self, reader: int) -> None:
        """Until the `with` has ended, or the time has come to leave."""
        while True:
            left = self._gone_by - time.monotonic()
            if not select.select([reader], [], [], None if left == float("inf") else max(0.0, left))[0]:
                self.leave(f"{self.why}, and no step ended in time")
            came = os.read(reader, 1)
            if not came:
                os.close(reader)
                return
            if came[0] in self.signals:
                self._heed(came[0])

    def _heed(self, number: int) -> None:
        """Set the flag, and how long there is, which a later signal may shorten."""
        came_at = time.monotonic()
        self.ask_to_leave()
        if self.at_once:
            self.leave(f"{signal.Signals(number).name} came")
        meant = self._meaning(number)
        if came_at + meant.seconds < self._gone_by:
            self.why, self._gone_by = meant.why, came_at + meant.seconds
            print(f"spresso: {meant.why}; {meant.seconds:.0f} s to save and leave", file=sys.stderr, flush=True)

    def _meaning(self, number: int) -> Meaning:
        try:
            job, kill_wait = scheduler.show(self.job), scheduler.kill_wait()
            if _time(job.get("PreemptTime", "")) is not None and _time(job.get("EndTime", "")) is None:
                end = time.time() + scheduler.grace_time(
                    job["Partition"]
                )  # SLURM tells it only of jobs with a time limit
                job["EndTime"] = datetime.fromtimestamp(end).isoformat()
        except (scheduler.QueueError, ValueError, IndexError, KeyError):
            job, kill_wait = {}, _KILL_WAIT
        return meaning(number, job, now=time.time(), grace=self.grace, kill_wait=kill_wait)


def _time(text: str) -> float | None:
    """SLURM's times are in this machine's own zone."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # None, Unknown
        return None
