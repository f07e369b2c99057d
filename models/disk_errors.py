"""What the numbers of a disk's errors mean: which recur until a person acts, and what mends them."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
"""The disk is full, or the user's share of it is."""
NOT_ALLOWED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
"""The disk, or a folder on it, refuses this user."""
LASTING = NO_ROOM | NOT_ALLOWED | {errno.ENOENT, errno.ENOTDIR}
"""Errors that recur until a person acts. Others, such as EIO or ESTALE, may be gone at the next try."""
PASSING = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EINTR,
        errno.EACCES,
        errno.ENFILE,
        errno.EMFILE,
        errno.ENXIO,
        errno.ENODEV,
        errno.ENOTCONN,
        errno.EREMOTEIO,
    }
)
"""Errors of reading that network file systems and busy machines give for a moment."""
NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""Errors that say what is at a path, not that its disk failed: there is no such file."""

PAUSES = (0.1, 1.0, 5.0)
"""Seconds to wait before a file whose disk failed is read again."""

logger = logging.getLogger(__name__)

_ROOM_WORDS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
}


def patiently(read: Callable[[], T], *, pauses: Sequence[float] | None = None) -> T:
    """Return what `read` returns; after an error that may pass, pause and call it again.

    Args:
        read: reads from the disk.
        pauses: seconds before each further call; None: `PAUSES`.

    Raises:
        OSError: the disk failed each time, so that the work has to stop: what it read may be whole.
    """
    for pause in PAUSES if pauses is None else pauses:
        try:
            return read()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            logger.warning("%s: trying again in %g s", error, pause)
        time.sleep(pause)
    return read()


def require_sound_disk(error: BaseException) -> None:
    """Raise the error of the disk behind a library's own error, if there is one, which may pass."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in PASSING - NOT_ALLOWED:
            raise cause
        cause = cause.__cause__ or cause.__context__


def with_number(number: int | None, message: str) -> OSError:
    """Return an OSError whose text is the message alone, and whose `errno` still tells what kind of error it is."""
    error = OSError(message)
    error.errno = number
    return error


def room_words(number: int | None) -> str:
    """Return the words for a full disk or a quota that is used up; empty for other errors."""
    return _ROOM_WORDS.get(number or 0, "")


def mend_words(number: int | None) -> str:
    """Return what mends an error of writing that lasts until a person acts; empty for other errors."""
    if number in NO_ROOM:
        return "free some space or set another run_dir"
    return "allow writing there or set another run_dir" if number in NOT_ALLOWED else ""


def first_lasting(numbers: list[int | None]) -> int | None:
    """Return the error number that stands for several ranks: one that a person must mend, else the first one."""
    known = [number for number in numbers if number is not None]
    order = [*sorted(NO_ROOM), *sorted(LASTING - NO_ROOM)]
    return next((number for number in order if number in known), known[0] if known else None)
