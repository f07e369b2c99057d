"""File locks and file digests."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from models.disk_errors import patiently


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, created if needed; other machines respect it if the file system has locks."""
    with path.open("a") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex, read again after an error of its disk that may pass."""

    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return patiently(read)
