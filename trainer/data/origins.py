"""Where a sound's bytes are if they are no file of their own: a part of a file, an object, or a cell of a table."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from models.disk_errors import NO_FILE, patiently
from models.regular_file import Bytes, WatchedBytes, WatchedFile
from trainer.data.bucket import SourceError, SourceFile, bucket_at, split_url
from trainer.data.remote import MissingFileError, is_url

_WINDOW = 64 << 10  # bytes that are read at once where only a header is wanted
_PIECE = 8 << 20  # bytes that are copied at once


class Section(msgspec.Struct, frozen=True, tag="section"):
    """`size` bytes of a file from `start` on: a member of a tar, a cell of an Arrow file, or all of the file."""

    where: str
    """The sound's place, for people."""
    stored: SourceFile
    start: int
    size: int


class TableCell(msgspec.Struct, frozen=True, tag="cell"):
    """A row of a Parquet file, whose bytes are compressed with those of its row group."""

    where: str
    stored: SourceFile
    column: str
    group: int
    row: int
    """The number of the row in the row group."""
    path: str
    """The file that the row names; read if the row has no bytes."""


class InMemory(msgspec.Struct, frozen=True, tag="held"):
    """Bytes in memory."""

    where: str
    content: bytes


class Lost(msgspec.Struct, frozen=True, tag="lost"):
    """A sound that the source names and does not hold."""

    where: str
    reason: str


Origin = Section | TableCell | InMemory | Lost


def local_file(path: Path) -> SourceFile:
    """Return a local file as it is now. Raises ValueError if it is missing, OSError if its disk fails."""
    try:
        status = patiently(path.stat)
    except OSError as error:
        if error.errno in NO_FILE:
            raise ValueError(f"{path} is missing") from error
        raise
    return SourceFile(str(path), status.st_size, str(status.st_mtime_ns))


def stored_at(place: str, patience: float) -> SourceFile:
    """Return a file as it is now, given its path or URL.

    Raises:
        ValueError, MissingFileError: it is missing.
        SourceError: the server does not say.
    """
    if not is_url(place):
        return local_file(Path(place))
    folder, name = split_url(place)
    return bucket_at(folder, patience).stored(name)


def require_same(stored: SourceFile, patience: float) -> None:
    """Raise SourceError if a file is no longer what it was when it was listed."""
    now: SourceFile | None
    try:
        now = stored_at(stored.place, patience)
    except (MissingFileError, ValueError):
        now = None
    if now is None or (now.size, now.version) != (stored.size, stored.version):
        raise SourceError(f"{stored.told} has changed or is gone since it was listed: run the same command again")


def read_bytes(stored: SourceFile, start: int, end: int, patience: float) -> bytes:
    """Return the bytes `start` … `end` - 1 of a file, fewer at the end of a local one that was cut meanwhile."""
    if is_url(stored.place):
        folder, name = split_url(stored.place)
        return bucket_at(folder, patience).read(name, start, end, stored.size)
    with closing(WatchedFile(Path(stored.place), start=start, size=end - start)) as file:
        content = file.buffer.read(end - start)
        file.require_sound_disk()
        return content


def glimpse(origin: Origin, path: Path, patience: float) -> Bytes:
    """Open a sound of which little is wanted, such as its header; only what is read crosses the network.

    Raises:
        ValueError: the source does not hold the sound.
    """
    if not (isinstance(origin, Section) and is_url(origin.stored.place)):
        return _opened(origin, path)
    held = (-1, b"")

    def read(start: int, end: int) -> bytes:
        nonlocal held
        first, content = held
        if not (first >= 0 and first <= start < first + len(content)):
            last = min(origin.size, max(end, start + _WINDOW))
            content = read_bytes(origin.stored, origin.start + start, origin.start + last, patience)
            held = first, content = start, content
        return content[start - first : end - first]

    return WatchedBytes(path, origin.size, read)


@contextmanager
def opened(origin: Origin, path: Path, *, spool: Path | None, name: str, patience: float) -> Iterator[Bytes]:
    """Open a sound to read all of it, perhaps more than once.

    One on a server is fetched into a file in `spool` for the time of the block; `name` is that file's.

    Raises:
        ValueError: the source does not hold the sound.
        SourceError: its file has changed, or can't be read.
    """
    if not isinstance(origin, Section):
        with closing(_opened(origin, path)) as file:
            yield file
    elif is_url(origin.stored.place):
        with tempfile.TemporaryDirectory(dir=spool, prefix=f"{name}.") as folder:
            copy = Path(folder) / "sound"
            _fetch(origin, copy, patience)
            with closing(WatchedFile(copy)) as file:
                yield file
    else:
        try:
            with closing(_opened(origin, path)) as file:
                yield file
        finally:  # what looks like a bad sound may be a file that changed
            require_same(origin.stored, patience)


def _fetch(origin: Section, copy: Path, patience: float) -> None:
    with copy.open("wb") as target:
        for at in range(origin.start, origin.start + origin.size, _PIECE):
            end = min(origin.start + origin.size, at + _PIECE)
            target.write(read_bytes(origin.stored, at, end, patience))
    require_same(origin.stored, patience)


def digest_of(file: Bytes) -> str:
    """Return the hash of `content_digest` of the bytes of an open sound."""
    digest = hashlib.blake2b(digest_size=16)
    file.seek(0, os.SEEK_SET)
    while piece := file.read(1 << 20):
        digest.update(piece)
    file.require_sound_disk()
    return digest.hexdigest()


def _opened(origin: Origin, path: Path) -> Bytes:
    if isinstance(origin, Lost):
        raise ValueError(f"{path} {origin.reason}")
    if isinstance(origin, Section):
        return WatchedFile(Path(origin.stored.place), start=origin.start, size=origin.size)
    assert isinstance(origin, InMemory), "a cell is read by `tables.Cells`"
    content = memoryview(origin.content)
    return WatchedBytes(path, len(content), lambda start, end: bytes(content[start:end]))
