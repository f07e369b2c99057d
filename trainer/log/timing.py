"""Measures how long each rank's steps take, and finds the ranks that slow the others down."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

_SLOW = 1.5  # A rank is slow if it takes more than this many times as long as the median rank, …
_MIN_OF_STEP, _MIN_SECONDS = 0.1, 0.05  # … and longer by more than this fraction of a step and this many seconds.


class StepClock:
    """Measures this rank's steps between two lines of the log.

    Collectives make all ranks wait for the slowest one, so the duration of whole steps does not show which rank is
    slow. A rank's *own* time does: it runs from the start of the step to the end of the forward pass, including the
    wait for data, and ends before the rank first waits for others. Under `zero3` and `fsdp2`, the forward pass already
    gathers weights from other ranks: there only the wait for data shows which rank is slow, and a slow GPU stays
    undetected.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Reset all times."""
        self.steps, self.whole, self.own = 0, 0.0, 0.0
        self._last: tuple[Any, Any] | None = None

    def begin(self) -> None:
        """Mark the start of a step."""
        self._host_begun, self._begun = time.perf_counter(), self._mark()

    def computed(self) -> None:
        """Mark the end of the step's last forward pass; on a GPU, that of the work submitted so far."""
        self._computed = self._mark()

    def end(self) -> None:
        """Mark the end of the step for the host. The device must have finished the step before it."""
        self._add_last()
        self._last = (self._begun, self._computed)
        self.whole += time.perf_counter() - self._host_begun
        self.steps += 1

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_last(self) -> None:
        """Add the own time of the last step that ended: on a GPU, its marks can be read only once they are passed."""
        if self._last is not None:
            begun, computed = self._last
            self.own += begun.elapsed_time(computed) / 1000 if self._cuda else computed - begun
            self._last = None

    def read(self, waited: float) -> Times:
        """Return this rank's mean times per step, and reset them. The device must have finished the last step.

        Args:
            waited: seconds that this rank waited for data in all steps since the last call.
        """
        steps = max(1, self.steps)
        self._add_last()
        mine = Times(self.whole / steps, self.own / steps, waited / steps, os.uname().nodename)
        self.restart()
        return mine


class Times(NamedTuple):
    """One rank's mean times per step, in seconds."""

    whole: float
    """Seconds per step."""
    own: float
    """Seconds before the rank waits for others, see `StepClock`."""
    data_wait: float
    """Seconds of waiting for data."""
    host: str
    """Name of the rank's host."""


def compared(of_ranks: Sequence[Times]) -> dict[str, Any]:
    """Compare ranks: [min, median, max] of whole steps, own times and waits for data in seconds; and the slow ranks."""
    whole, own, waits, hosts = zip(*of_ranks, strict=True)
    slow = [
        {"rank": rank, "host": host, "own": round(own[rank], 4), "data_wait": round(waits[rank], 4)}
        for rank, host in enumerate(hosts)
        if any(_stands_out(times, rank, whole[rank]) for times in (own, waits))
    ]
    return {
        "step_seconds": _spread(whole),
        "own_seconds": _spread(own),
        "data_wait_seconds": _spread(waits),
        "slow_ranks": slow,
    }


def _stands_out(times: tuple[float, ...], rank: int, step: float) -> bool:
    usual = statistics.median_low(times)
    return times[rank] > _SLOW * usual and times[rank] - usual > max(_MIN_OF_STEP * step, _MIN_SECONDS)


def _spread(values: tuple[float, ...]) -> list[float]:
    return [round(value, 5) for value in (min(values), statistics.median_low(values), max(values))]
