"""Opens files that users name: a pipe is never waited for, and a bad file is told from a bad disk.

`WatchedFile` and `WatchedBytes` are for decoders, which would take an I/O error for the end of the file.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path

from models.disk_errors import NOT_ALLOWED, patiently
from models.readable import describe_os_error, kind_of

_BUFFER = 1 << 18
_OWN_FAULTS = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors of opening that come from the path itself, not from its disk."""
_OF_PERMISSIONS, _OF_DEVICES = (errno.EACCES, errno.EPERM), (errno.ENXIO, errno.ENODEV)
"""Errors of opening that come from either."""


def open_regular(path: Path) -> int:
    """Open a file for reading and return its descriptor. Pipes and devices are never waited for.

    Raises:
        ValueError: the file is missing, is no regular file, or its permissions don't allow to read it.
        OSError: the disk failed, or refuses access that the file's permissions grant.
    """
    descriptor = patiently(lambda: _open(path))
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    raise ValueError(f"{path} is {kind_of(kind)}, not a file")


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        own = error.errno in _OWN_FAULTS or (error.errno in _OF_DEVICES and not path.is_file())
        if own or (error.errno in _OF_PERMISSIONS and not _permits(path)):
            raise ValueError(describe_os_error(OSError(error.errno, error.strerror, str(path)))) from error
        raise


def _permits(path: Path) -> bool:
    """Whether the permissions grant access, so that its refusal comes from elsewhere, such as a lapsed ticket."""
    try:
        status = patiently(path.stat)
    except OSError as error:
        return error.errno not in NOT_ALLOWED  # a folder above it refuses
    groups = {os.getegid(), *os.getgroups()}
    owner, group = status.st_uid == os.geteuid(), status.st_gid in groups
    return bool(status.st_mode & (stat.S_IRUSR if owner else stat.S_IRGRP if group else stat.S_IROTH))


class WatchedFile(io.RawIOBase):
    """A regular file, which remembers an error of its disk, because decoders would take it for the end of the file."""

    def __init__(self, path: Path, *, start: int = 0, size: int | None = None) -> None:
        """Open the file, or `size` bytes of it from `start` on; raises the errors of `open_regular`."""
        super().__init__()
        self.path = path
        self.error: OSError | None = None
        self._descriptor = open_regular(path)
        self._start, self._is_part = start, size is not None
        self.size = os.fstat(self._descriptor).st_size if size is None else size
        self.buffer = io.BufferedReader(self, _BUFFER)
        self.seek(0)

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        """Fill `target`; after an error, which `require_sound_disk` raises, claim that the file has ended."""
        if self._is_part:
            target = memoryview(target)[: max(0, self.size - self.tell())]
        try:
            return patiently(lambda: os.readv(self._descriptor, [target]))
        except OSError as error:
            self.error = self.error or error
            return 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        base = 0 if whence == os.SEEK_SET else self.tell() if whence == os.SEEK_CUR else self.size
        # damaged headers send decoders before the beginning and far behind the end
        place = min(max(base + offset, 0), self.size)
        return os.lseek(self._descriptor, self._start + place, os.SEEK_SET) - self._start

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return os.lseek(self._descriptor, 0, os.SEEK_CUR) - self._start

    def close(self) -> None:
        """See `io.RawIOBase`."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def require_sound_disk(self) -> None:
        """Raise the disk I/O error, if there was one."""
        if self.error is not None:
            raise OSError(self.error.errno, self.error.strerror, str(self.path)) from self.error


class WatchedBytes(io.RawIOBase):
    """Bytes in memory or on a server as a file of `WatchedFile`'s kind.

    Args:
        path: the name for errors.
        size: the number of bytes.
        read: returns the bytes from a first to a last offset, exclusive. It raises OSError if they can't be had.
    """

    def __init__(self, path: Path, size: int, read: Callable[[int, int], bytes]) -> None:
        super().__init__()
        self.path, self.size, self._read = path, size, read
        self.error: OSError | None = None
        self._place = 0
        self.buffer = io.BufferedReader(self, _BUFFER)

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        """Fill `target`; after an error, which `require_sound_disk` raises, claim that the bytes have ended."""
        end = min(self._place + len(target), self.size)
        try:
            content = self._read(self._place, end) if end > self._place else b""
        except OSError as error:
            self.error = self.error or error
            return 0
        target[: len(content)] = content
        self._place += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        base = 0 if whence == os.SEEK_SET else self._place if whence == os.SEEK_CUR else self.size
        self._place = min(max(base + offset, 0), self.size)
        return self._place

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._place

    def require_sound_disk(self) -> None:
        """Raise the error of a read, if there was one."""
        if self.error is not None:
            raise self.error


Bytes = WatchedFile | WatchedBytes
