"""File locks and file digests."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

from models.disk_errors import patiently

_LOOK = 0.2  # seconds between two looks at whether a turn has come
_TOUCH, _STALE = 10.0, 120.0
"""Seconds between two touches of a file that stands for a turn, and without one until the turn counts as given up."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, created if needed; other machines respect it if the file system has locks."""
    with path.open("a") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def long_turn(path: Path, *, seconds: float) -> Iterator[None]:
    """Let one process at a time into a block that may take hours, on all machines that share the file's disk.

    The turn is a lock on the file, which goes when its process dies. On a file system without locks, who creates
    `PATH.turn` has the turn, and touches it meanwhile: one that nobody touches for two minutes is a dead process's.

    Raises:
        ValueError: another process has had the turn for `seconds`.
    """
    until = time.monotonic() + seconds
    with path.open("a") as file:
        held = _lock_before(file, path, until)
        with nullcontext() if held else _created(path.with_name(f"{path.name}.turn"), until):
            yield


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex, read again after an error of its disk that may pass."""

    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return patiently(read)


def _lock_before(file: TextIO, path: Path, until: float) -> bool:
    """Lock an open file; return False if its file system has no locks. Raises ValueError."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            _pause(path, until)
        except OSError:
            return False


@contextmanager
def _created(path: Path, until: float) -> Iterator[None]:
    """Hold a turn by a file that this process alone has created. Raises ValueError."""
    seen, since = -1, time.monotonic()
    while not _create(path):
        if (touched := _touched(path)) != seen:
            seen, since = touched, time.monotonic()
        elif time.monotonic() - since > _STALE:
            path.unlink(missing_ok=True)
        _pause(path, until)
    over = threading.Event()
    toucher = threading.Thread(target=_touch, args=(path, over), daemon=True)
    toucher.start()
    try:
        yield
    finally:
        over.set()
        toucher.join()
        path.unlink(missing_ok=True)


def _create(path: Path) -> bool:
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    return True


def _touch(path: Path, over: threading.Event) -> None:
    while not over.wait(_TOUCH):
        with suppress(OSError):  # the disk does not answer now
            os.utime(path)


def _touched(path: Path) -> int:
    """Return when a file was touched last, by the clock of its disk; -1 if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return -1


def _pause(path: Path, until: float) -> None:
    if time.monotonic() > until:
        raise ValueError(f"another process has held {path} for too long: see its log, end it, and repeat the command")
    time.sleep(_LOOK)
