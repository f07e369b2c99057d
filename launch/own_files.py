"""Decides which files `spresso encode` and `decode` may write: new ones and their own, but never one that they read.

A stream of ours is known by its first bytes, a decoded sound by the mark that `decode` leaves in it. Everything else is
somebody's work, which no option replaces.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from models import bitstream
from models.readable import describe_os_error, kind_of
from trainer.data.audio import sound_mark
from trainer.data.find_sounds import SUFFIXES

FileId = tuple[int, int]
"""Device and inode: the same for all links to a file and all spellings of its name."""
DECODE_MARK = "spresso decode"
"""What the mark of every decoded sound begins with."""

_NOTES = {"spresso decode": " (version 0.1.0 left no mark)"}
"""What is said of a foreign file in addition, by the command that would write it."""


def file_ids(paths: Iterable[Path]) -> set[FileId]:
    """Return the identities of those of the files that exist."""
    found = set()
    for path in paths:
        try:
            status = path.stat()
        except OSError:  # whoever reads the file says what is wrong with it
            continue
        found.add((status.st_dev, status.st_ino))
    return found


def refusal(target: Path, inputs: set[FileId], is_ours: Callable[[Path], bool], writer: str) -> str:
    """Return why a target must not be written, as a sentence; empty if it may be.

    Args:
        target: file to write.
        inputs: files that the command reads.
        is_ours: whether a file was written by the command's `writer`, so that it may be replaced.
        writer: command that writes the target, for people.
    """
    try:
        found = target.lstat()
        status = target.stat() if stat.S_ISLNK(found.st_mode) and target.exists() else found
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return describe_os_error(error)
    if (status.st_dev, status.st_ino) in inputs:
        return f"{target} is an input of this command, which is never overwritten: give another name"
    if stat.S_ISLNK(found.st_mode):
        return f"{target} is a link to {target.readlink()}: give that name itself, or remove the link"
    if not stat.S_ISREG(found.st_mode):
        return f"{target} is {kind_of(found.st_mode)}, which can't be written as a file: give another name"
    if found.st_size and not is_ours(target):
        note = _NOTES.get(writer, "")
        return f"{target} was not written by `{writer}`{note}, so it is kept: remove it, or give another name or folder"
    return ""


def is_stream(path: Path) -> bool:
    """Whether a file begins as a stream does, whole or damaged."""
    with path.open("rb") as file:
        start = file.read(len(bitstream.MAGIC) + 1)
    versions = (bitstream.BITSTREAM_VERSION, bitstream.INTERLEAVED_VERSION)
    return start in [bitstream.MAGIC + bytes([version]) for version in versions]


def is_decoded_sound(path: Path) -> bool:
    """Whether a file bears the mark of a decoded sound."""
    return sound_mark(path).startswith(DECODE_MARK)


def require_stream_name(target: Path) -> None:
    """Raise ValueError if a stream would get the name of a sound, as in `spresso encode *.wav` with two sounds."""
    if target.name.lower().endswith(SUFFIXES):
        raise ValueError(
            f"{target} is the name of a sound, but a stream would be written there: give a name that ends in .spr, "
            "or two folders to encode several sounds"
        )
