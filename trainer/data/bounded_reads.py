"""Reads of remote files that end, whatever the server sends: in bytes and in seconds."""

from __future__ import annotations

import time
from typing import Any

_STEP = 1 << 20  # bytes that are asked of a stream at a time


class TooLongError(Exception):
    """A server sends more than a file may have."""


def read_whole(filesystem: Any, path: str, *, most: int, seconds: float) -> bytes:
    """Return the content of a remote file of at most `most` bytes.

    Args:
        filesystem: one of fsspec's.
        path: the file, as the filesystem names it.
        most: bytes that the file may have, after a server's compression is undone.
        seconds: how long it may take over HTTP.

    Raises:
        TooLongError: the file is longer.
        TimeoutError: it took longer.
        Exception: see fsspec's backends.
    """
    if streams(filesystem):
        content = _streamed(filesystem, path, {}, most=most, seconds=seconds)
    elif int(filesystem.info(path)["size"]) <= most:
        content = filesystem.cat_file(path)
    else:
        raise TooLongError
    if len(content) > most:
        raise TooLongError
    return content


def read_range(filesystem: Any, path: str, start: int, end: int, *, size: int, seconds: float) -> bytes:
    """Return bytes `start` … `end` - 1 of a remote file, or the whole file of `size` bytes if the server sends that.

    Raises as `read_whole` does; `TooLongError` where a server sends more than `size` bytes.
    """
    if not streams(filesystem):
        return filesystem.cat_file(path, start=start, end=end)
    headers = {"Range": f"bytes={start}-{end - 1}"}
    content = _streamed(filesystem, path, headers, most=size, seconds=seconds)
    if len(content) > size:
        raise TooLongError
    return content


def streams(filesystem: Any) -> bool:
    """Whether a file system's own reads take all that a server sends, which HTTP alone lets a stranger decide."""
    return "http" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))


def _streamed(filesystem: Any, path: str, headers: dict[str, str], *, most: int, seconds: float) -> bytes:
    """Return what a server sends, up to a step more than `most` bytes."""
    until, content = time.monotonic() + seconds, bytearray()
    # a block size of zero asks for a stream, and a size saves the request that would ask for it
    with filesystem.open(path, "rb", block_size=0, size=1, headers=headers) as file:
        while len(content) <= most and (piece := file.read(_STEP)):
            content += piece
            if time.monotonic() > until:
                raise TimeoutError(f"only {len(content)} bytes came in {seconds:g} s")
    return bytes(content)
