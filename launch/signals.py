"""Signals that ask a run to leave: they set a flag, and the loop saves and leaves at its next step boundary."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Self

from trainer.stop import Stop

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
MISTAKE = 2  # exit status: the user is told what to mend
INTERRUPTED = 130  # exit status: a second Ctrl-C
STOPPED = 75  # exit status (sysexits' EX_TEMPFAIL): saved, and the same command goes on from there
_ONE_PRESS = 1.0  # seconds: a terminal's Ctrl-C reaches each rank twice, from the terminal and from its parent


class StopFlag(Stop):
    """Callable inside its `with`: whether one of the signals has come. A second Ctrl-C interrupts at once."""

    signals = SIGNALS

    def __init__(self) -> None:
        self._set_at: float | None = None
        self.why = "a signal"
        """Why it was set."""

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether to leave."""
        return self._set_at is not None

    def ask_to_leave(self) -> None:
        """Set it."""
        if self._set_at is None:
            self._set_at = time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._set_at is None:
            self.ask_to_leave()
        elif number == signal.SIGINT and time.monotonic() - self._set_at > _ONE_PRESS:
            raise KeyboardInterrupt
