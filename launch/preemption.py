"""Signals that ask a run to leave: they set a flag, and the loop saves and leaves at its next step boundary."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
STOPPED = 75  # exit status (sysexits' EX_TEMPFAIL): saved, and the same command goes on from there


class StopFlag:
    """Callable: whether one of the signals has come. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self._set = False
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        """Whether to leave."""
        return self._set

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._set = True
