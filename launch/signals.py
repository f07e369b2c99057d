"""Signals that ask a run to stop. They set a flag; the training loop then saves and stops at the next step boundary."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Self

from trainer.stop import Stop

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
MISTAKE = 2  # exit status: a user's mistake, which the message explains
INTERRUPTED = 130  # exit status: interrupted by a second Ctrl-C
STOPPED = 75  # exit status (EX_TEMPFAIL of sysexits): saved, and the same command resumes
_ONE_PRESS = 1.0  # seconds: one Ctrl-C reaches each rank twice, from the terminal and from its parent process


def heeded(signals: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Return the signals without SIGHUP if the process ignores that one, as `nohup` arranges."""
    return [number for number in signals if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


class StopFlag(Stop):
    """Inside its `with` block, calling it tells whether a signal has arrived. A second Ctrl-C interrupts at once."""

    signals = SIGNALS

    def __init__(self) -> None:
        self._set_at: float | None = None
        self.why = "a signal"
        """Reason for which the flag was set, for people."""

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in heeded(self.signals)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self._set_at is not None

    def ask_to_leave(self) -> None:
        """Set the flag, unless it is set already."""
        if self._set_at is None:
            self._set_at = time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._set_at is None:
            self.ask_to_leave()
        elif number == signal.SIGINT and time.monotonic() - self._set_at > _ONE_PRESS:
            raise KeyboardInterrupt
