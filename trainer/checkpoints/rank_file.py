"""Reads one rank's file of a checkpoint: flat float32 ranges in the safetensors layout.

This module reads with plain system calls instead of the library's memory map: a disk I/O error then arrives as an
`OSError` with its number, while it would kill a process that reads from a map.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LARGEST_HEADER = 100_000_000  # bytes; the library's own limit
_NUMBER = 4  # bytes of a float32


class RankFile:
    """An open file of a checkpoint, whose header was checked against the manifest.

    Raises:
        ValueError: the file is not what the manifest says. The message names the file and the tensor.
        OSError: the file can't be read now.
    """

    def __init__(self, file: FileIO, ranges: Mapping[str, list[int]]) -> None:
        """Check the header against the manifest's ranges, name → [start, stop)."""
        self.file, self.name, self.ranges = file, Path(str(file.name)).name, ranges
        length = int.from_bytes(self._bytes(0, 8), "little")
        size = file.seek(0, 2)
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise ValueError(f"{self.name} is not a safetensors file")
        header = self._header(length)
        metadata = header.pop("__metadata__", None) or {}
        self._first = 8 + length
        self._begin: dict[str, int] = {}
        starts = self._saved_starts(metadata)
        for name, (start, stop) in ranges.items():
            self._begin[name] = self._begin_of(name, header.get(name), stop - start, size)
            if starts.get(name, start) != start:
                raise ValueError(f"{self.name} holds {name} from {starts[name]} on, but the manifest says {start}")
        if strays := [name for name in header if name not in ranges]:
            raise ValueError(f"{self.name} holds {strays[0]}, which the manifest does not give to it")

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Read the elements [start, stop) of a flattened tensor, which lie within this file's range of it."""
        values = torch.empty(stop - start, dtype=torch.float32)
        if start < stop:
            offset = self._first + self._begin[name] + _NUMBER * (start - self.ranges[name][0])
            self._fill(values.numpy().view(np.uint8).data, offset)
        return values

    def _begin_of(self, name: str, entry: Any, numel: int, size: int) -> int:
        """Return the offset of a tensor's first byte; raise ValueError unless its type and shape are right."""
        if not isinstance(entry, dict):
            raise ValueError(f"{self.name} has no {name}, which the manifest gives to it")
        if entry.get("dtype") != "F32" or entry.get("shape") != [numel]:
            raise ValueError(
                f"{self.name} holds {name} as {entry.get('dtype')} of the shape {entry.get('shape')}, but the manifest "
                f"says F32 of the shape {[numel]}"
            )
        match entry.get("data_offsets"):
            case [int(begin), int(end)] if begin >= 0 and end - begin == _NUMBER * numel and self._first + end <= size:
                return begin
        raise ValueError(f"{self.name} is damaged: the numbers of {name} do not lie in the file")

    def _header(self, length: int) -> dict[str, Any]:
        try:
            header = json.loads(self._bytes(8, length))
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise ValueError(f"{self.name} is not a safetensors file: its header is damaged")
        return header

    def _saved_starts(self, metadata: Mapping[str, Any]) -> dict[str, int]:
        """Return the start of each range as the file itself states it; empty if it does not."""
        try:
            stated = json.loads(metadata.get("DCP_SHARDING_INFO", "{}"))
            return {name: facts["saved_offsets"][0] for name, facts in stated.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(f"{self.name} is damaged: its DCP_SHARDING_INFO can't be read") from None

    def _bytes(self, offset: int, length: int) -> bytes:
        content = bytearray(length)
        self._fill(memoryview(content), offset)
        return bytes(content)

    def _fill(self, target: memoryview, offset: int) -> None:
        self.file.seek(offset)
        while len(target):  # One call reads at most 2 GiB.
            read = self.file.readinto(target)
            if not read:
                raise ValueError(f"{self.name} is truncated")
            target = target[read:]
