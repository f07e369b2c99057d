"""Files that appear whole or not at all: the one way in which this project writes a file that others read.

A file is written under a hidden name beside its place, brought to the disk, and renamed. Readers see the old content or
the new one. What only informs, such as a status that is written every few seconds, need not be on the disk when the
write returns: `durable=False` leaves that to the system, and the file is still never seen in part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a hidden name beside `path` to write to; it becomes `path` when the block ends well, else it is removed.

    The name is this process's own: several, on several machines, may write the same file.
    """
    partial = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write a small file in one piece, and its folder where there is none; text is written as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=durable) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
