"""Asks SLURM about jobs again and again, for what watches runs: seldom, in the background, and never twice at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Event, Lock, Thread

from launch.slurm import scheduler
from launch.slurm.scheduler import JobState
from launch.status.stage_status import StageStatus

LEAST = 10.0
"""Seconds between two queries, at least: hundreds of people may watch one controller."""
ENDED_LEAST = 300.0
"""Seconds between two queries about a job that has ended: accounting is asked about those that SLURM has forgotten."""

States = Mapping[str, list[JobState]]


class QueueWatch:
    """Remembers the last states of jobs, and asks for new ones in a thread, so that a slow SLURM holds up nothing."""

    def __init__(
        self,
        ask: Callable[[list[str]], States] = scheduler.states,
        *,
        least: float = LEAST,
        patience: float = 3.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Remember nothing yet.

        Args:
            ask: returns the states of jobs.
            least: seconds between two queries.
            patience: seconds that the first call waits, so that the first table is whole where SLURM answers at once.
            now: the clock.
        """
        self._ask, self._now, self.least, self.patience = ask, now, least, patience
        self._lock, self._answered = Lock(), Event()
        self._states: dict[str, list[JobState]] = {}
        self._told: dict[str, float] = {}
        self._problem, self._asked_at = "", float("-inf")
        self._busy = False

    def fill(self, stages: Sequence[StageStatus]) -> str:
        """Fill in the last known states of the stages' jobs; return the problem if SLURM did not answer."""
        jobs = dict.fromkeys(stage.job.job for stage in stages if stage.job is not None)
        if jobs:
            self._ask_in_background(jobs)
            self._answered.wait(self.patience)
        with self._lock:
            for stage in stages:
                if stage.job is not None:
                    stage.elements = self._states.get(stage.job.job, [])
            return self._problem if jobs else ""

    def _ask_in_background(self, jobs: Iterable[str]) -> None:
        """Start a query, unless one is under way or the last one is too fresh."""
        with self._lock:
            now = self._now()
            due = [job for job in jobs if self._is_due(job, now)]
            if self._busy or not due or now - self._asked_at < self.least:
                return
            self._busy, self._asked_at = True, now
        Thread(target=self._query, args=(due,), daemon=True, name="queue").start()

    def _is_due(self, job: str, now: float) -> bool:
        alive = any(state.alive for state in self._states.get(job, [])) or job not in self._states
        return alive or now - self._told[job] >= ENDED_LEAST

    def _query(self, jobs: list[str]) -> None:
        found: States = {}
        problem = ""
        try:
            found = self._ask(jobs)
        except scheduler.QueueError as error:
            problem = f"SLURM does not answer: {str(error).splitlines()[0].rpartition(' failed: ')[2]}"
        finally:
            with self._lock:
                self._states.update(found)
                self._told.update(dict.fromkeys(found, self._now()))
                self._problem, self._busy = problem, False
            self._answered.set()
