"""A folder of this user alone for the cache of remote shards, on a node where others can write to the same disk.

In a folder for temporary files, another user may have put a folder or a link of his own in the place of ours. Neither
is followed, so that nobody feeds us his shards or has us write to a file of ours that he names.
"""

from __future__ import annotations

import getpass
import io
import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from models.readable import kind_of

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_SET = re.compile(r"[0-9a-f]{16}")
_ELSEWHERE = "give another data.cache.folder"


def default_folder() -> Path:
    """Return `spresso-USER` on the node's own disk."""
    return Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()) / own_name()


def own_name() -> str:
    """Return the name of this user's folder in one that several users share."""
    try:
        return f"spresso-{getpass.getuser()}"
    except (KeyError, OSError):  # a container need not have a name for each user
        return f"spresso-{os.getuid()}"


def claim(named: Path | None) -> Path:
    """Return the cache's folder, which is made if it is missing.

    Args:
        named: the folder that the user names; None: `default_folder`. If others may write to the named one, the cache
            is a folder of ours in it.

    Raises:
        ValueError: what is there is a link, no folder, or another user's.
        OSError: it can't be made or looked at.
    """
    if named is None:
        return own_folder(default_folder())
    named.mkdir(0o700, parents=True, exist_ok=True)
    status = named.stat()  # the user may name a link
    if status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_MAY_WRITE:
        return named
    return own_folder(named / own_name())


def own_folder(path: Path) -> Path:
    """Make a folder that nobody else can enter, unless this user has one there; raises as `claim` does."""
    with suppress(FileExistsError):
        path.mkdir(0o700, parents=True)
    status = path.lstat()
    _require_own(path, status)
    if not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"the cache {path} is {kind_of(status.st_mode)}, not a folder: remove it, or {_ELSEWHERE}")
    if status.st_mode & _OTHERS_MAY_WRITE:
        path.chmod(0o700)
    return path


def open_own(path: Path, flags: int) -> io.FileIO:
    """Open a file of the cache without following a link and without truncating it; O_CREAT makes a missing one.

    Raises:
        ValueError: it is a link, no regular file, or another user's.
        FileNotFoundError, OSError: see `os.open`.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link, which is not followed: remove it, or {_ELSEWHERE}")
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    mode = "rb" if flags & os.O_ACCMODE == os.O_RDONLY else "rb+"
    file = io.FileIO(str(path), mode, opener=lambda name, unused: os.open(name, flags, 0o600))
    try:
        status = os.fstat(file.fileno())
        _require_own(path, status)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is {kind_of(status.st_mode)}, not a file: remove it, or {_ELSEWHERE}")
    except BaseException:
        file.close()
        raise
    return file


def set_folders(all_sets: Path) -> list[Path]:
    """Return the folders of sets in a cache; everything else there is not the cache's, and never evicted."""
    return [
        path for path in all_sets.iterdir() if _SET.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]


def _require_own(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise ValueError(f"the cache's {path} belongs to another user, and is not used: {_ELSEWHERE}")
    if stat.S_ISLNK(status.st_mode):
        raise ValueError(f"the cache {path} is a link, which is not followed: remove it, or {_ELSEWHERE}")
