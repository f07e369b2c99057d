"""Locks of the file system, which die with the process that holds them.

A lock is held on an open file. Processes in other containers of the machine see it. Other machines see it if the file
system shares its locks; some do not, and some have no locks at all.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_PATIENCE = 60.0  # seconds; whoever holds a turn asks SLURM at most
_STALE = 30.0  # seconds after which, on a file system without locks, a turn counts as that of a killed process
_PAUSE = 0.02  # seconds between two tries


def lock(file: BinaryIO) -> bool:
    """Lock an open file for this process; return False if another holds it or the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file; False if there is no file or the file system has no locks."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Let one process at a time into the block; `path` is a file that exists meanwhile.

    On a file system without locks, who creates the file has the turn.

    Raises:
        ValueError: another process has been in its block for a minute.
    """
    deadline = time.monotonic() + _PATIENCE
    while (file := _entered(path)) is None:
        if time.monotonic() > deadline:
            raise ValueError(f"another process has held {path} for {_PATIENCE:.0f} s: repeat the command")
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes, so that whoever gets the lock sees that the file is gone
        file.close()


def _entered(path: Path) -> BinaryIO | None:
    """Return the locked file; None if another process holds its lock, or has removed it."""
    try:
        created, file = True, path.open("xb")
    except FileExistsError:
        created, file = False, path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        entered = _is_there(file, path)
    except BlockingIOError:
        entered = False
    except OSError:  # a file system without locks
        entered = created
        if not created and time.time() - os.fstat(file.fileno()).st_mtime > _STALE:
            path.unlink(missing_ok=True)
    if entered:
        return file
    file.close()
    return None


def _is_there(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
