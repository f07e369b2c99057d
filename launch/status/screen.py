"""A terminal's window that is redrawn in place, and that is given back as it was on every way out."""

from __future__ import annotations

import os
import select
import signal
import sys
import unicodedata
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from launch.signals import heeded

_ENTER = "\x1b[?1049h\x1b[?25l"  # the alternate screen, without a cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Screen:
    """Inside its `with` block, `show` redraws the window, and `wait` ends early when the window's size changes.

    Ctrl-C raises KeyboardInterrupt; SIGTERM and SIGHUP raise SystemExit with 128 + the signal's number. Ctrl-Z gives
    the terminal back until the process is continued.
    """

    def __init__(self) -> None:
        self._is_to_stop = False

    def __enter__(self) -> Self:
        self._waker, self._woken = os.pipe()
        for descriptor in (self._waker, self._woken):
            os.set_blocking(descriptor, False)
        self._wakeup_before = signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = {
            **dict.fromkeys(heeded(_ENDING), _end),
            signal.SIGWINCH: _ignore,
            signal.SIGTSTP: self._note_stop,
        }
        self._before: dict[signal.Signals, Any] = {
            number: signal.signal(number, handler) for number, handler in handlers.items()
        }
        _write(_ENTER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _write(_LEAVE)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        for descriptor in (self._waker, self._woken):
            os.close(descriptor)

    def show(self, lines: Sequence[str], foot: str) -> None:
        """Redraw the window with as many lines as fit, and a last line."""
        size = os.get_terminal_size(sys.stdout.fileno())
        columns, rows = max(1, size.columns), max(1, size.lines)
        shown = fitted(lines, foot, columns=columns, rows=rows)
        # a line is cleared before it is written: after one as wide as the window, its last letter would be cleared
        below = f"\r\n{_END_OF_SCREEN}" if len(shown) < rows else ""
        _write(_HOME + "\r\n".join(_END_OF_LINE + line for line in shown) + below)

    def wait(self, seconds: float) -> None:
        """Wait, or return earlier if a signal arrives, such as of a new size of the window."""
        if select.select([self._waker], [], [], seconds)[0]:
            os.read(self._waker, 4096)
        if self._is_to_stop:
            self._stop()

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        """Note that Ctrl-Z was pressed; `wait` stops the process, because `show` may be writing now."""
        self._is_to_stop = True

    def _stop(self) -> None:
        """Stop this process as Ctrl-Z does, with the terminal as it was; enter again when the process goes on."""
        self._is_to_stop = False
        _write(_LEAVE)
        os.kill(os.getpid(), signal.SIGSTOP)  # SIGTSTP would be passed over where no shell controls jobs
        _write(_ENTER)


def fitted(lines: Sequence[str], foot: str, *, columns: int, rows: int) -> list[str]:
    """Return at most `rows` lines, each cut to `columns`: the first of `lines`, how many have no room, and `foot`."""
    room = rows - 1
    if len(lines) > room:
        kept = max(0, room - 1)
        lines = [*lines[:kept], f"… {len(lines) - kept} more lines: enlarge the window, or name one run"][:room]
    return [_cut(line, columns) for line in (*lines, foot)]


def _cut(line: str, columns: int) -> str:
    """Cut a line to a width in columns; wide letters take two."""
    width = 0
    for number, letter in enumerate(line):
        width += 2 if unicodedata.east_asian_width(letter) in "WF" else not unicodedata.combining(letter)
        if width > columns:
            return line[:number]
    return line


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler that does nothing: the signal's byte in the pipe ends the wait."""
