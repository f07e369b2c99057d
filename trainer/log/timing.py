"""Where the time goes: each rank's steps, and which ranks hold the others up."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

_SLOW = 1.5  # times the median rank's own time
_NOTED, _LEAST = 0.1, 0.05  # of a step, and seconds: what is below that is nobody's concern


class StepClock:
    """Times of this rank since the log last asked.

    Collectives make all ranks equally slow. What tells them apart is a rank's *own* time: from the step's start to the
    end of its forward pass, waiting for data included, before it first waits for others. Under `zero3` and `fsdp2` the
    forward pass gathers weights from other ranks, so there the wait for data alone tells, and a slow GPU stays unseen.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Forget what was."""
        self.steps, self.whole, self.own = 0, 0.0, 0.0

    def begin(self) -> None:
        """A step begins; nothing of the one before is under way on the device."""
        self._host_begun, self._begun = time.perf_counter(), self._mark()

    def computed(self) -> None:
        """Its forward pass has ended, for the host at least."""
        self._computed = self._mark()

    def end(self) -> None:
        """It has ended, on the device too."""
        if self._cuda:
            self._computed.synchronize()
            self.own += self._begun.elapsed_time(self._computed) / 1000
        else:
            self.own += self._computed - self._begun
        self.whole += time.perf_counter() - self._host_begun
        self.steps += 1

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self, waited: float) -> Times:
        """This rank's times a step, `waited` seconds of all for data; begins anew."""
        steps = max(1, self.steps)
        mine = Times(self.whole / steps, self.own / steps, waited / steps, os.uname().nodename)
        self.restart()
        return mine


class Times(NamedTuple):
    """A rank's: seconds a step, of its own, and waiting for data; and the host it is on."""

    whole: float
    own: float
    data_wait: float
    host: str


def compared(of_ranks: Sequence[Times]) -> dict[str, Any]:
    """Seconds a step as [min, median, max] over ranks: whole steps, own time, waits for data; and who is slow."""
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
    return times[rank] > _SLOW * usual and times[rank] - usual > max(_NOTED * step, _LEAST)


def _spread(values: tuple[float, ...]) -> list[float]:
    return [round(value, 5) for value in (min(values), statistics.median_low(values), max(values))]
