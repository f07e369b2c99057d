"""Ends a rank that hangs, with the stacks of all its threads in its log.

A collective that one rank does not come to holds up all of them, each in the same place: so each rank has its own
clock, and every rank's log tells where it stood. Python's `faulthandler` keeps the clock in a thread of its own that
needs neither the interpreter's lock nor the stuck thread's help.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_PATIENT = 6  # times longer: the first step compiles and connects; decoding and loading are not steps
_RARELY = 0.05  # of the time: the clock is not set again within it, as that starts a thread each time
_BEFORE = 0.9  # of the time: when the collectives are told, while Python may still run


class Watchdog:
    """In its `with`, more than `seconds` between two calls of `beat` end the process with exit status 1."""

    def __init__(self, log: Path, seconds: float) -> None:
        """`log` is appended to; 0 seconds: no watch is kept."""
        self.log, self.seconds, self.patience = log, seconds, float(_PATIENT)
        self._left = threading.Event()
        self._armed_at = self._limit = 0.0
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # NCCL's flight recorder keeps so many collectives

    def beat(self) -> None:
        """All is well up to now."""
        self.patience = 1.0
        self._arm()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Around what takes longer than a step: an evaluation, a checkpoint that is waited for."""
        before, self.patience = self.patience, max(self.patience, _PATIENT)
        self._arm()
        try:
            yield
        finally:
            self.patience = before
            self._arm()

    def _arm(self) -> None:
        now, limit = time.monotonic(), self.seconds * self.patience
        if limit and (limit != self._limit or now - self._armed_at > _RARELY * limit):
            faulthandler.dump_traceback_later(limit, exit=True, file=self._file)
            self._armed_at, self._limit, self._last_moment = now, limit, now + _BEFORE * limit

    def _record_flights(self) -> None:
        """Shortly before the end, in a thread: which collectives were under way, where there is NCCL."""
        while not self._left.wait(min(1.0, 0.05 * self.seconds)):
            if time.monotonic() > self._last_moment:
                _dump_flights(self.log.with_name(self.log.stem + "_collectives.json"))
                return

    def __enter__(self) -> Self:
        if self.seconds:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.log.open("a")
            self._faults = not faulthandler.is_enabled()
            if self._faults:
                faulthandler.enable(self._file)  # NCCL's own watchdog aborts
            self._arm()
            if torch.cuda.is_available():
                threading.Thread(target=self._record_flights, name="flights", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.seconds:
            self._left.set()
            faulthandler.cancel_dump_traceback_later()
            if self._faults:
                faulthandler.disable()
            self._file.close()


def collective_timeout(seconds: float) -> timedelta:
    """After how long a collective itself gives up: later than any watchdog."""
    return timedelta(seconds=seconds * 2 * _PATIENT) if seconds else timedelta(days=30)


def _dump_flights(path: Path) -> None:
    """What NCCL's flight recorder has of the last collectives, as JSON."""
    from torch._C import _distributed_c10d

    path.write_bytes(_distributed_c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
