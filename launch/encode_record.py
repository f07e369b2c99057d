"""Remembers what each stream was made from, so that `spresso encode` of a folder can tell which streams still hold.

Every folder of streams has a hidden file `.encoded.jsonl` with a line for each stream: {"stream": name, "crc32":
checksum of the stream, "sound": [bytes, mtime_ns, ctime_ns] and "sha256" of its sound, "settings": codec and options}.
The last line of a name counts. A stream holds if its sound still has the recorded size and times; if only the times
differ, the sound is read again and its content decides. A stream without a line, such as one of an older version, is
judged by dates and length, see `FileEncoder`.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from models.documents import Lines, parse_json, to_json
from trainer.files import file_digest

RECORD = ".encoded.jsonl"
_FOLDERS = 16  # whose lines are kept in memory; sounds come sorted by path, so that few folders are open at a time

SoundVersion = list[int]
"""Size in bytes, time of the last change of the content and of the file's entry (ctime), both in ns.

The ctime also tells a sound of the same size and date that was moved over the old one."""


class _Entry(TypedDict):
    stream: str
    crc32: str
    sound: Annotated[list[int], msgspec.Meta(min_length=3, max_length=3)]
    sha256: NotRequired[str | None]
    settings: NotRequired[str]


def version_of(sound: Path) -> SoundVersion:
    """Return the version of a sound as its folder knows it, without reading the sound."""
    status = sound.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def crc32_of(stream: bytes) -> str:
    """Return the checksum at the end of a stream, in hex."""
    return stream[-4:].hex()


class EncodeRecord:
    """The records of all folders below a folder of streams, each read when its first stream is asked for."""

    def __init__(self) -> None:
        self._lines: OrderedDict[Path, dict[str, str]] = OrderedDict()

    def checksum(self, stream: Path) -> str | None:
        """Return the checksum that a stream had when it was recorded; None if it was not."""
        return self._entry(stream).get("crc32")

    def holds(self, sound: Path, stream: Path, settings: str) -> bool:
        """Whether a recorded stream was made with these settings from the sound as it is now."""
        entry, version = self._entry(stream), version_of(sound)
        if entry.get("settings") != settings:
            return False
        if entry.get("sound") == version:
            return True
        digest = entry.get("sha256")
        if not digest or entry["sound"][0] != version[0] or file_digest(sound) != digest:
            return False
        self.add(stream, entry["crc32"], version, digest, settings)  # the sound was copied or touched, not changed
        return True

    def add(self, stream: Path, crc32: str, version: SoundVersion, digest: str | None, settings: str) -> None:
        """Append a line; `digest` is None if the sound's content was not read."""
        line = to_json(
            {"stream": stream.name, "crc32": crc32, "sound": version, "sha256": digest, "settings": settings}
        )
        path = stream.parent / RECORD
        with path.open("a+b") as file:
            if file.tell() and not _ends_with_newline(path):  # a killed process left half a line
                line = f"\n{line}"
            file.write(f"{line}\n".encode())
        self._of_folder(stream.parent)[stream.name] = line

    def _entry(self, stream: Path) -> dict[str, Any]:
        line = self._of_folder(stream.parent).get(stream.name)
        return {} if line is None else dict(parse_json(line, _Entry, RECORD, mend=""))

    def _of_folder(self, folder: Path) -> dict[str, str]:
        """Return name → line of a folder. Lines take a third of the memory of what they hold."""
        if folder not in self._lines:
            self._lines[folder] = _read_lines(folder / RECORD)
            while len(self._lines) > _FOLDERS:
                self._lines.popitem(last=False)
        self._lines.move_to_end(folder)
        return self._lines[folder]


def _read_lines(path: Path) -> dict[str, str]:
    """Read a record; a damaged line is left out, as if its stream had no record. Raises OSError if the disk fails."""
    lines: Lines[Any] = Lines(path, _Entry)
    found = {entry["stream"]: line.decode() for line, entry in lines.pairs()}
    lines.require_readable()
    return found


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
