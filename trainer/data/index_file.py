"""Reads the index of a set, and holds it against what `set.json` says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.disk_errors import patiently
from models.documents import opened
from trainer.data.index_row import well_formed
from trainer.data.shards import MAKE_AGAIN, SetInfo, set_checksum, set_fingerprint

CHECKED = ("total_frames", "shortest_frames", "longest_frames", "fingerprint", "checksum")
"""Fields of `set.json` that follow from the index. Sets of release 0.1.0 have no `checksum`."""


def open_mapped(path: Path) -> np.memmap[Any, np.dtype[np.void]]:
    """Map an index. A damaged header gives errors of many kinds, because numpy evaluates the header as Python."""
    with opened(path):  # a pipe would hold up numpy
        pass
    return np.lib.format.open_memmap(path, mode="r")


def read_whole(path: Path, mapped: np.memmap[Any, np.dtype[np.void]]) -> NDArray[np.void]:
    """Read a mapped index, read-only: a disk I/O error kills a process that reads from a map, without a word.

    Raises:
        ValueError: the file has become shorter.
        OSError: the file can't be read now.
    """

    def read() -> bytes:
        with opened(path) as file:
            file.seek(mapped.offset)
            return file.read(mapped.nbytes)

    try:
        content = patiently(read)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    if len(content) != mapped.nbytes:
        raise ValueError(f"{path} has become shorter: {MAKE_AGAIN}")
    return np.frombuffer(content, mapped.dtype)


def is_described(
    index: NDArray[np.void], info: SetInfo, shards: Sequence[tuple[str, int]], said: Mapping[str, Any]
) -> bool:
    """Whether an index is the one that a set's `set.json` was written for.

    Args:
        index: all rows.
        info: the facts that all samples share, as `set.json` says them.
        shards: (name, bytes) of each shard.
        said: the fields `CHECKED` of `set.json`. Without a `checksum`, an exchange of two samples' metadata or audio is
            not seen, because the fingerprint leaves out where the members lie.
    """
    if not len(index) or not well_formed(index, info.latent_channels).all():
        return False
    frames = index["frames"]
    found = {
        "total_frames": int(frames.sum(dtype=np.int64)),
        "shortest_frames": int(frames.min()),
        "longest_frames": int(frames.max()),
        "fingerprint": set_fingerprint(info, index),
    }
    if "checksum" in said:
        found["checksum"] = set_checksum(info, shards, index)
    return all(said[name] == value for name, value in found.items())
