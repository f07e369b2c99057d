"""Output whose reader may go away: a terminal that is closed, or a pipe into a `tee` or `head` that has ended.

A command that works for hours must not end because nobody reads what it prints.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any

_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET, errno.EBADF)
"""Errors of writing to a pipe, terminal or socket whose other end is closed."""
_GONE_READERS: set[int] = set()


class LossyFile(io.FileIO):
    """A file descriptor to write to. Once its reader is gone, all further output goes to /dev/null."""

    def write(self, data: Any) -> int:
        """Write bytes; return how many were taken. Bytes that nobody can read count as taken."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            _redirect_to_null(self.fileno())
            _GONE_READERS.add(self.fileno())
            return len(memoryview(data).cast("B"))


def survive_readers() -> None:
    """Let this process go on when the readers of its stdout and stderr are gone; call it once, as the process starts.

    Descriptors that are closed already are opened to /dev/null, so that no file takes their numbers.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout, sys.stderr = _lossy(sys.stdout, 1), _lossy(sys.stderr, 2)


def reader_is_gone(*descriptors: int) -> bool:
    """Whether the reader of one of these descriptors is gone, by default of this process's stdout or stderr."""
    return bool(_GONE_READERS.intersection(descriptors or _GONE_READERS))


def _lossy(stream: Any, descriptor: int) -> Any:
    with suppress(Exception):  # a stream that is None, or whose reader is gone already
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(LossyFile(descriptor, "w", closefd=False)),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors=getattr(stream, "errors", None) or "backslashreplace",
        line_buffering=descriptor == 2 or os.isatty(descriptor),
        write_through=bool(getattr(stream, "write_through", False)),
    )


def _redirect_to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
