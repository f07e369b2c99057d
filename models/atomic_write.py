"""Atomic file writes: every file that other processes read appears whole or not at all.

A file is written to a hidden file in the same folder, flushed to disk, and renamed, so that readers see either the old
or the new content. `durable=False` skips the flush, for files such as a status that is written every few seconds;
readers still never see such a file in part.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.processes import stat_fields
from models.readable import kind_of

_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""How file systems say that they can't flush a folder."""
_LONGEST = 255  # bytes of a file name on all common file systems


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a hidden path in the same folder to write to; rename it to `path` if the block succeeds, else remove it.

    The hidden name contains the host, the namespace of the process id and that id, so several processes may write the
    same file, also from containers that share a host name. If it would be too long for the file system, a hash stands
    for the file's name.

    Raises:
        ValueError: `path` is a folder, a pipe or a device, which a rename would fail on or take away.
    """
    require_no_special_file(path)
    partial = path.with_name(_hidden_name(path.name, f".{_namespace()}-{os.getpid()}.partial"))
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the hidden files of processes of this host that were killed while they wrote into a folder.

    Those of processes in other containers stay, because their process ids say nothing here.
    """
    ending = re.compile(rf"\..*\.{re.escape(_namespace())}-(\d+)\.partial", re.DOTALL)
    for path in folder.iterdir():
        if (match := ending.fullmatch(path.name)) and not _lives(int(match[1])):
            path.unlink(missing_ok=True)


def _namespace() -> str:
    """Return the host, and the number of the namespace in which this process has its id: 0 if the system has none."""
    try:
        number = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        number = 0
    return f"{os.uname().nodename}-{number}"


def _lives(pid: int) -> bool:
    """Whether a process can still write: one that was killed and that its parent has not waited for yet cannot."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return stat_fields(pid)[:1] not in (["Z"], ["X"])  # if nothing is known, a leftover that stays does no harm


def _hidden_name(name: str, ending: str) -> str:
    hidden = f".{name}{ending}"
    if len(os.fsencode(hidden)) <= _LONGEST:
        return hidden
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}{ending}"


def require_no_special_file(path: Path) -> None:
    """Raise ValueError if a path that is to be written is a folder, a pipe or a device."""
    try:
        mode = path.stat().st_mode
    except OSError:  # the path is free, or the write itself will say why it fails
        return
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {kind_of(mode)}, which can't be written as a file: give another name")


def write_whole(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write a small file atomically and create its folder if it is missing; text is written as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=durable) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to disk.

    Some network and FUSE file systems can't flush a folder. This is passed over, because they keep names themselves.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)
