"""Runs a tracker beside training: a bounded queue and a thread of its own, so that no tracker holds a step up.

A tracker may raise, hang or be slow. Training then goes on, the tracker lacks some events, and the log says so once;
`metrics.jsonl` and `samples/` have everything.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Protocol

from trainer.file_names import printable
from trainer.log.trackers.events import Event, HeardClip, Points, WentBack
from trainer.urls import without_credentials

logger = logging.getLogger(__name__)

MOST_EVENTS = 256
"""Events that wait for a tracker; one more is left out."""
MOST_BYTES = 256 << 20
"""Bytes of the events that wait. Trackers share the arrays of their events."""
_RETRY, _LONGEST_RETRY = 30.0, 1800.0  # seconds between two tries to start a tracker

_abandoned: list[str] = []


class Sink(Protocol):
    """Where a tracker's thread writes. Any method may raise, and none is called from another thread."""

    def start(self) -> None:
        """Open the tracker; called again after it has raised."""

    def points(self, event: Points) -> None:
        """Draw the points of a line of the log."""

    def clip(self, event: HeardClip) -> None:
        """Show a listening sample."""

    def go_back(self, samples: int) -> None:
        """Make room for curves that begin again after `samples`."""

    def finish(self) -> None:
        """Flush and close the tracker."""


class Background:
    """A tracker that runs beside training."""

    def __init__(self, name: str, sink: Sink) -> None:
        """Begin to start the tracker in its thread, and return at once."""
        self.name, self.sink = name, sink
        self.left_out = 0
        """Events that the tracker lacks."""
        self._waiting: deque[Event] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closing = self._gone = self._warned = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        """Hand an event over without waiting; it is left out if the tracker is too far behind."""
        with self._changed:
            full = len(self._waiting) >= MOST_EVENTS or self._bytes + event.nbytes > MOST_BYTES
            if full and self._waiting and not isinstance(event, WentBack):
                self._leave_out("is too far behind")
                return
            self._waiting.append(event)
            self._bytes += event.nbytes
            self._changed.notify()

    def close(self) -> None:
        """Tell the tracker that no more events come."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, until: float) -> None:
        """Wait until the tracker has written everything, but no longer than `until`, a time of `time.monotonic`."""
        self._thread.join(max(0.0, until - time.monotonic()))
        with self._changed:
            if self._thread.is_alive():
                self._gone = True
                self.left_out += len(self._waiting)
                _abandoned.append(self.name)
                logger.warning("the tracker %s does not end, and is left behind", self.name)
        if self.left_out:
            logger.warning("the tracker %s lacks %d event(s); metrics.jsonl has them", self.name, self.left_out)

    def _work(self) -> None:
        if self._started():
            while (event := self._next()) is not None:
                self._guarded(event)
            self._finish()

    def _started(self) -> bool:
        """Start the tracker, again and again until it starts or the run ends."""
        pause = _RETRY
        while True:
            try:
                self.sink.start()
                return True
            except (Exception, SystemExit) as error:
                with self._changed:
                    self._warn(f"does not start: {_told(error)}")
                    self._changed.wait_for(lambda: self._closing, timeout=pause)
                    if self._closing:
                        self.left_out += len(self._waiting)
                        return False
            pause = min(2 * pause, _LONGEST_RETRY)

    def _next(self) -> Event | None:
        """Wait for the next event; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing or self._gone)
            if self._gone or not self._waiting:
                return None
            event = self._waiting.popleft()
            self._bytes -= event.nbytes
            return event

    def _guarded(self, event: Event) -> None:
        try:
            if isinstance(event, WentBack):
                self.sink.go_back(event.samples)
            elif isinstance(event, HeardClip):
                self.sink.clip(event)
            else:
                self.sink.points(event)
        except (Exception, SystemExit) as error:
            with self._changed:
                self._leave_out(f"fails: {_told(error)}")

    def _finish(self) -> None:
        try:
            self.sink.finish()
        except (Exception, SystemExit) as error:
            self._warn(f"does not end well: {_told(error)}")

    def _leave_out(self, why: str) -> None:
        self.left_out += 1
        self._warn(why)

    def _warn(self, why: str) -> None:
        """Warn once: whatever fails in a tracker may fail with every event."""
        if not self._warned:
            self._warned = True
            logger.warning("the tracker %s %s; training goes on without it", self.name, why)


def any_abandoned() -> bool:
    """Whether a tracker of this process hangs, so that its exit handlers would hang, too."""
    return bool(_abandoned)


def _told(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message, without credentials."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {printable(without_credentials(line))}"[:400]
