"""Reads samples of a local set one by one; this is the hot path of a shuffled order."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import NamedTuple

from isal.isal_zlib import crc32  # the same sum as zlib's, several times as fast

from trainer.data.places import Places

Taken = Callable[[int, int], None]
"""Called with the row of a sample that has just been read, and with the start of its bytes in the memory."""


class Memory(NamedTuple):
    """The memory into which the samples of a batch are read."""

    buffer: memoryview
    """The bytes of all rows."""
    row_bytes: int
    taken: Taken | None
    """Takes each sample out of the memory once it is read; without it, each stays in its row."""

    def row(self, start: int) -> int:
        """Return the row that begins at a byte of the buffer."""
        return start // self.row_bytes


def read_each(places: Places, memory: Memory, open_shard: Callable[[int], io.FileIO]) -> list[int]:
    """Read samples; returns the numbers of those that could not be read whole and unchanged.

    Samples that are taken at once are all read into the beginning of the memory, which thus stays in the processor's
    cache: to read, check and cut a sample there takes less than to read it into a row of its own, and to cut it later.
    """
    failed, preadv = [], os.preadv
    buffer, row_bytes, taken = memory
    for number, (shard, offset, length, checksum, start, end) in enumerate(places):
        values = buffer[:length] if taken else buffer[start:end]
        try:
            file = open_shard(shard)
            # The checksum is computed while the sample's bytes are still in the processor's cache.
            if preadv(file.fileno(), (values,), offset) != length or crc32(values) != checksum:
                failed.append(number)
            elif taken:
                taken(start // row_bytes, 0)
        except OSError:
            failed.append(number)
    return failed
