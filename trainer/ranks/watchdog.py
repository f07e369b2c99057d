"""Ends a rank that hangs, and writes the stacks of all its threads to its log.

If one rank does not reach a collective, all other ranks wait in it. So each rank has its own watchdog, and every rank's
log shows where the rank was. The timeout runs in a thread of Python's `faulthandler`, which needs neither the
interpreter's lock nor any cooperation of the stuck thread.
"""

from __future__ import annotations

import faulthandler
import math
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

_PATIENT = 6  # factor on the timeout for the first step, which compiles and connects, and for evaluations and saves
_REARM_AFTER = 0.05  # fraction of the timeout: re-arming starts a thread, so it is not done more often
_DUMP_AFTER = 0.9  # fraction of the timeout after which the last collectives are written, while Python may still run


class Watchdog:
    """Ends the process with exit status 1 if, inside the `with`, `beat` is not called for more than `seconds`."""

    def __init__(self, log: Path, seconds: float) -> None:
        """`log` is the file that stacks are appended to; 0 seconds turn the watchdog off."""
        self.log, self.seconds, self.patience = log, seconds, float(_PATIENT)
        self._closed = threading.Event()
        self._armed_at = self._limit = 0.0

    def beat(self) -> None:
        """Report progress: restart the timeout."""
        self.patience = 1.0
        self._arm()

    @contextmanager
    def allow_longer(self) -> Iterator[None]:
        """Extend the timeout inside the `with`, for work that takes longer than a step, such as an evaluation."""
        before, self.patience = self.patience, max(self.patience, _PATIENT)
        self._arm()
        try:
            yield
        finally:
            self.patience = before
            self._arm()

    def _arm(self) -> None:
        now, limit = time.monotonic(), self.seconds * self.patience
        if limit and (limit != self._limit or now - self._armed_at > _REARM_AFTER * limit):
            faulthandler.dump_traceback_later(limit, exit=True, file=self._file)
            self._armed_at, self._limit, self._dump_at = now, limit, now + _DUMP_AFTER * limit

    def _dump_collectives_in_time(self) -> None:
        """Write NCCL's last collectives shortly before the timeout ends the process. Runs in a thread."""
        while not self._closed.wait(min(1.0, 0.05 * self.seconds)):
            if time.monotonic() > self._dump_at:
                _dump_collectives(self.log.with_name(self.log.stem + "_collectives.json"))
                return

    def __enter__(self) -> Self:
        if self.seconds:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.log.open("a")
            self._faults = not faulthandler.is_enabled()
            if self._faults:
                faulthandler.enable(self._file)  # NCCL's own watchdog aborts the process; this logs the stacks then.
            self._arm()
            if torch.cuda.is_available():
                threading.Thread(target=self._dump_collectives_in_time, name="flights", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.seconds:
            self._closed.set()
            faulthandler.cancel_dump_traceback_later()
            if self._faults:
                faulthandler.disable()
            self._file.close()


def prepare_nccl(seconds: float) -> None:
    """Set the environment that NCCL's process group reads when it is made; what the user has set stays.

    Args:
        seconds: those of the watchdog. NCCL's own heartbeat, by default 480 s, aborts a process without a word of where
            it was, so it has to come later.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # how many collectives its flight recorder keeps
    if seconds:
        longest = math.ceil(collective_timeout(seconds).total_seconds())
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(longest))


def collective_timeout(seconds: float) -> timedelta:
    """Return the timeout of collectives, which is longer than that of any watchdog."""
    return timedelta(seconds=seconds * 2 * _PATIENT) if seconds else timedelta(days=30)


def _dump_collectives(path: Path) -> None:
    """Write what NCCL's flight recorder knows of the last collectives, as JSON."""
    from torch._C import _distributed_c10d

    # `_dump_fr_trace_json` is Gloo's; a build without CUDA has no other.
    recorders = vars(_distributed_c10d)
    path.write_bytes((recorders.get("_dump_nccl_trace_json") or recorders["_dump_fr_trace_json"])())
