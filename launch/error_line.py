"""Words an error for the user: one line that says what failed and what mends it."""

from __future__ import annotations

from models.disk_errors import NOT_ALLOWED, mend_words, room_words
from models.readable import describe_os_error
from trainer.file_names import printable_lines


def describe_error(error: Exception) -> str:
    """Return the message of an error for the user; a full disk, a quota and refused access name what to do."""
    text = str(error)
    if isinstance(error, OSError):
        if full := room_words(error.errno):
            where = f" for {error.filename}" if error.filename else ""
            return f"{full}{where}: {mend_words(error.errno)}, and repeat the command"
        text = describe_os_error(error)
        if error.errno in NOT_ALLOWED and error.filename:
            text = f"{text}; allow it or name another path"
    return printable_lines(text)
