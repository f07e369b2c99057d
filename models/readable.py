"""Says in plain words why a file or folder can't be read: missing, a broken link, a folder, no permission.

Libraries that open files themselves report all of these as one "system error". The words follow the path's name:
`f"{path} {file_trouble(path)}"` is a sentence.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_WORDS = {
    errno.ENOENT: "is missing",
    errno.EACCES: "can't be opened: permission denied",
    errno.EPERM: "can't be opened: permission denied",
    errno.EISDIR: "is a folder, not a file",
    errno.ENOTDIR: "is missing: a part of its path is a file, not a folder",
    errno.ELOOP: "is a link that leads back to itself",
    errno.ENAMETOOLONG: "has a name that is too long for this disk",
    errno.ENXIO: "is a socket or a device, not a file",
    errno.EEXIST: "exists already",
    errno.EROFS: "is on a disk that can only be read",
}


def require_file(path: Path) -> None:
    """Raise ValueError unless a path leads to a file that can be opened; the message says what is there instead."""
    if trouble := file_trouble(path):
        raise ValueError(f"{path} {trouble}")


def file_trouble(path: Path) -> str:
    """Return why a path can't be read as a file, in words that follow its name; empty if it can be."""
    return _trouble(path, "a file", os.R_OK)


def folder_trouble(path: Path) -> str:
    """Return why a path can't be listed as a folder, in words that follow its name; empty if it can be."""
    return _trouble(path, "a folder", os.R_OK | os.X_OK)


def kind_of(mode: int) -> str:
    """Return what the mode of a file's status says that it is, with an article: a file, a folder, a pipe …"""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "something unknown")


def is_broken_link(path: Path) -> bool:
    """Whether a path is a link to something that is missing, perhaps only now: a mount may be away."""
    return path.is_symlink() and not path.exists()


def describe_os_error(error: OSError) -> str:
    """Return an OSError as a sentence that begins with the path; the error's own text if it has no path."""
    if error.filename is None or error.errno is None:
        return str(error)
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    if error.errno == errno.ENOENT and Path(path).is_symlink():
        return f"{path} {_broken_link(Path(path))}"
    reason = error.strerror or "unknown reason"
    return f"{path} {_WORDS.get(error.errno, f'failed: {reason[0].lower()}{reason[1:]}')}"


def _trouble(path: Path, wanted: str, access: int) -> str:
    try:
        found = kind_of(path.stat().st_mode)
    except OSError as error:
        return describe_os_error(OSError(error.errno, error.strerror, str(path))).removeprefix(f"{path} ")
    if found != wanted:
        return f"is {found}, not {wanted}"
    return "" if os.access(path, access) else _WORDS[errno.EACCES]


def _broken_link(path: Path) -> str:
    return f"is a link to {path.readlink()}, which is missing"
