"""Ends a rank that hangs, with the stacks of all its threads in its log.

A collective that one rank does not come to holds up all of them, each in the same place: so each rank has its own
clock, and every rank's log tells where it stood. Python's `faulthandler` keeps the clock in a thread of its own that
needs neither the interpreter's lock nor the stuck thread's help.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

_PATIENT = 6  # times longer: the first step compiles and connects; decoding and loading are not steps
_AFTER_NCCL = 1.25  # by then NCCL's own watchdog has written its flight recorder


class Watchdog:
    """In its `with`, more than `seconds` between two calls of `beat` end the process with exit status 1."""

    def __init__(self, log: Path, seconds: float) -> None:
        """`log` is appended to; 0 seconds: no watch is kept."""
        self.log, self.seconds, self.patience = log, _AFTER_NCCL * seconds, float(_PATIENT)

    def beat(self, *, patience: float = 1.0) -> None:
        """All is well up to now; the next call may take `patience` times as long as a step."""
        self.patience = patience
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
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds * self.patience, exit=True, file=self._file)

    def __enter__(self) -> Self:
        if self.seconds:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.log.open("a")
            self._arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()


def collective_timeout(seconds: float) -> timedelta | None:
    """After how long a collective itself gives up; None: torch's default."""
    return timedelta(seconds=seconds * _PATIENT) if seconds else None


def record_flights(folder: Path) -> None:
    """Have NCCL keep its last collectives, and write them there when one times out. To be called before it starts."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl_flight_"))
