"""A job's notice to leave: what a signal from SLURM means, and how much time remains.

SLURM sends SIGUSR2 before the time limit (and before a preemption, if the cluster is configured so) and SIGTERM for
anything else. Only the controller knows the reason and the deadline. A thread asks the controller. The thread is woken
by the interpreter's C handler (`signal.set_wakeup_fd`), because a rank that hangs in a collective runs no Python signal
handler. The thread also ends a rank that hangs before the cluster kills the job, so that the batch script is alive to
requeue the job.
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
_LAST_STEP = 10.0  # seconds for the current step after another rank has died: no later step can end
_FOR_THE_SCRIPT = 10.0  # seconds that the batch script needs to requeue the job
_FOR_THE_ANSWER = 5.0  # seconds that a run which has saved waits to learn why it was asked to leave
_SAME = 2.0  # seconds: SLURM sends a signal to each process of a task, and a supervisor passes its own on
_SLACK = 90.0  # seconds: SLURM announces a time limit up to a minute early


@dataclass(frozen=True)
class Meaning:
    """Meaning of a signal."""

    why: str
    """Reason, for people."""
    seconds: float
    """Seconds from the signal until this rank must have ended."""


def meaning(number: int, job: dict[str, str], *, now: float, grace: float, kill_wait: float) -> Meaning:
    """Return what a signal means.

    Args:
        number: the signal.
        job: the controller's description of the job; empty if it gave no answer.
        now: time of the signal, in seconds since the epoch.
        grace: seconds before the time limit at which SLURM sends SIGUSR2.
        kill_wait: seconds between SIGTERM and SIGKILL.
    """
    end = _time(job.get("EndTime", ""))
    left = grace if end is None else end - now
    usable = left - min(_FOR_THE_SCRIPT, 0.25 * max(0.0, left))
    announced = number == signal.SIGUSR2
    if not job:
        seconds = 0.8 * (grace if announced else kill_wait)
        return Meaning("got a signal, and SLURM's controller does not answer", seconds)
    if job.get("JobState") in ("COMPLETING", "CANCELLED"):
        return Meaning("was cancelled", 0.8 * kill_wait)
    if _time(job.get("PreemptTime", "")) is not None:
        return Meaning("was preempted", usable if left > 1 else 0.8 * kill_wait)
    if announced:
        return Meaning("the time limit is near" if left < grace + _SLACK else "was asked to requeue", usable)
    return Meaning("was asked to end, or another rank died", min(0.8 * kill_wait, _LAST_STEP))


class Notice(StopFlag):
    """StopFlag of a job's rank, which knows its deadline."""

    def __init__(self, job: str, *, grace: float, leave: Callable[[str], NoReturn], at_once: bool = False) -> None:
        """Prepare the flag; the `with` block watches for signals.

        Args:
            job: SLURM's job id.
            grace: seconds before the time limit at which SLURM sends SIGUSR2.
            leave: ends the process; called at the deadline if the training loop has not ended by then.
            at_once: call `leave` at the first signal, for a stage that has nothing to save.
        """
        super().__init__()
        self.job, self.grace, self.leave, self.at_once = job, grace, leave, at_once
        self._deadline = float("inf")
        self._meant = threading.Event()
        self._came_at = dict[int, float]()
        """When a signal last came."""
        self._kill_wait: float | None = None
        """See `scheduler.kill_wait`; None until the controller has been asked."""

    def reason(self) -> str:
        """Return why the run was asked to leave; wait some seconds for the controller's answer if it is still out."""
        if self():
            self._meant.wait(_FOR_THE_ANSWER)
        return self.why

    def has_less_than(self, seconds: float) -> bool:
        """Whether an action of so many seconds would end after the deadline."""
        return time.monotonic() + seconds > self._deadline

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
        """Wait for signals until the `with` block ends or the deadline has come."""
        while True:
            left = self._deadline - time.monotonic()
            if not select.select([reader], [], [], None if left == float("inf") else max(0.0, left))[0]:
                self.leave(f"{self.why}, and no step ended in time")
            byte = os.read(reader, 1)
            if not byte:
                os.close(reader)
                return
            if byte[0] in self.signals:
                self._handle_notice(byte[0])

    def _handle_notice(self, number: int) -> None:
        """Set the flag and the deadline, which a later signal may only bring forward."""
        came_at = time.monotonic()
        self.ask_to_leave()
        if self.at_once:
            self.leave(f"received {signal.Signals(number).name}")
        before, self._came_at[number] = self._came_at.get(number), came_at
        if before is not None and came_at - before < _SAME:
            return  # all ranks ask the controller at once, so none asks twice
        meant = self._meaning(number)
        if came_at + meant.seconds < self._deadline:
            self.why, self._deadline = meant.why, came_at + meant.seconds
            print(f"spresso: {meant.why}; {meant.seconds:.0f} s to save and leave", file=sys.stderr, flush=True)
        self._meant.set()

    def _meaning(self, number: int) -> Meaning:
        try:
            job = scheduler.show(self.job)
            if self._kill_wait is None:
                self._kill_wait = scheduler.kill_wait()
            if _time(job.get("PreemptTime", "")) is not None and _time(job.get("EndTime", "")) is None:
                # SLURM gives the end of a preempted job only if the job has a time limit
                end = time.time() + scheduler.grace_time(job["Partition"])
                job["EndTime"] = datetime.fromtimestamp(end).isoformat()
        except (scheduler.QueueError, ValueError, IndexError, KeyError):
            job = {}
        kill_wait = _KILL_WAIT if self._kill_wait is None else self._kill_wait
        return meaning(number, job, now=time.time(), grace=self.grace, kill_wait=kill_wait)


def _time(text: str) -> float | None:
    """Return seconds since the epoch; None if SLURM gives no time. SLURM's times are in the local time zone."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # "None" or "Unknown"
        return None
