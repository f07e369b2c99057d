"""Keeps the clips of one file in memory while they are few, and on disk when they are many."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Clip:
    """A sample of a set; the fields are the arguments of `ShardWriter.write`."""

    key: str
    x0: NDArray[np.float16]
    metadata: dict[str, Any]
    flac: bytes
    text: NDArray[np.float16] | None = None


class ClipStore:
    """Clips in the order in which they were added, which take at most `limit` bytes of memory.

    The store can be sent to another process on the same machine. Iterating over a store that is on disk removes it.
    """

    def __init__(self, path: Path | None = None, *, limit: int = 32 << 20) -> None:
        """`path` is the file for more than `limit` bytes of clips; None keeps them all in memory."""
        self.path, self.limit = path, limit
        self._clips: list[Clip] = []
        self._bytes = 0
        self._count = self._on_disk = 0

    def __len__(self) -> int:
        return self._count

    def append(self, clip: Clip) -> None:
        """Add a clip. Raises OSError if it can't be written."""
        self._clips.append(clip)
        self._count += 1
        self._bytes += clip.x0.nbytes + len(clip.flac) + (0 if clip.text is None else clip.text.nbytes)
        if self.path is not None and self._bytes > self.limit:
            with self.path.open("ab" if self._on_disk else "wb") as file:
                for held in self._clips:
                    _write(file, held)
            self._on_disk += len(self._clips)
            self._clips, self._bytes = [], 0

    def __iter__(self) -> Iterator[Clip]:
        if self.path is not None and self._on_disk:
            with self.path.open("rb") as file:
                for _ in range(self._on_disk):
                    yield _read(file)
        yield from self._clips
        self.clear()

    def clear(self) -> None:
        """Forget all clips."""
        if self.path is not None and self._on_disk:
            self.path.unlink(missing_ok=True)
        self._clips, self._bytes, self._count, self._on_disk = [], 0, 0, 0


def _write(file: BinaryIO, clip: Clip) -> None:
    text = None if clip.text is None else clip.text.shape
    head = {"key": clip.key, "metadata": clip.metadata, "x0": clip.x0.shape, "flac": len(clip.flac), "text": text}
    file.write(json.dumps(head).encode() + b"\n")
    file.write(np.ascontiguousarray(clip.x0).tobytes() + clip.flac)
    if clip.text is not None:
        file.write(np.ascontiguousarray(clip.text).tobytes())


def _read(file: BinaryIO) -> Clip:
    head = json.loads(file.readline())
    x0, flac = _read_array(file, head["x0"]), file.read(head["flac"])
    return Clip(head["key"], x0, head["metadata"], flac, head["text"] and _read_array(file, head["text"]))


def _read_array(file: BinaryIO, shape: list[int]) -> NDArray[np.float16]:
    size = 2 * int(np.prod(shape))
    content = file.read(size)
    if len(content) < size:
        raise OSError(f"{file.name} was cut off while it was used")
    return np.frombuffer(content, np.float16).reshape(shape)
