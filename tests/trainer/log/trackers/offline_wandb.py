"""Reads the file that W&B writes offline: protobuf records in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32_768
_HEADER = 7  # bytes: checksum, length, kind
_WHOLE, _FIRST, _LAST = 1, 2, 4  # kinds of a part of a record; 3 is one in the middle


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of history of all offline runs below a folder, whose folders `wandb-N` are of one start each."""
    files = sorted(folder.glob("wandb-*/offline-run-*/run-*.wandb"))
    return [row for file in files for row in _rows(file)]


def run_ids(folder: Path) -> set[str]:
    """Return the ids of the offline runs below a folder."""
    return {
        record.run.run_id
        for file in folder.glob("wandb-*/*/run-*.wandb")
        for record in _records(file)
        if record.run.run_id
    }


def configs(folder: Path) -> str:
    """Return all that the offline runs below a folder hold, as text."""
    return "\n".join(str(record) for file in folder.glob("wandb-*/*/run-*.wandb") for record in _records(file))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for record in _records(file):
        if record.WhichOneof("record_type") == "history":
            yield {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}


def _records(file: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    for content in _contents(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        yield record


def _contents(data: bytes) -> Iterator[bytes]:
    place, parts = _HEADER, b""  # after the file's own header
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        part = data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        parts = part if kind in (_WHOLE, _FIRST) else parts + part
        if kind in (_WHOLE, _LAST):
            yield parts
