"""A set of shards to read from: samples by their place in the index, each checked as it is read."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from trainer.data.shards import (
    INDEX_ROW,
    INDEX_ROW_WITH_AUDIO,
    MAKE_AGAIN,
    VERSION,
    DamagedSample,
    SetInfo,
    fingerprint,
    pread,
    well_formed,
)

_OPEN_FILES = 256  # shards that one process keeps open
_GAP = 16 << 10  # bytes between two samples that are cheaper to read than to leave out
_BUFFERS = 512  # to one read; Linux takes 1024


class ShardSet:
    """A folder of shards with its index.

    Attributes: `folder`; `info` (`SetInfo`); `fingerprint`, a hash of all latents in their order; `index`, the rows;
    `total_frames`; `shortest_frames` and `longest_frames`, of the clips; `has_audio`.

    Raises:
        ValueError: the folder is not a set, or its files are not those that its index was made from.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            description = json.loads((folder / "set.json").read_text(encoding="utf-8"))
            self.index = np.lib.format.open_memmap(folder / "index.npy", mode="r")
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename} is missing: make the set with `spresso prepare`") from error
        except ValueError as error:
            raise ValueError(f"the index of {folder} is damaged ({error}): {MAKE_AGAIN}") from error
        if description.pop("version", None) != VERSION:
            raise ValueError(f"{folder}/set.json is of another version of this program: {MAKE_AGAIN}")
        self._shards = [(folder / shard["name"], shard["bytes"]) for shard in description.pop("shards")]
        self.fingerprint: str = description.pop("fingerprint")
        samples: int = description.pop("samples")
        self.total_frames: int = description.pop("total_frames")
        self.shortest_frames: int = description.pop("shortest_frames")
        self.longest_frames: int = description.pop("longest_frames")
        self.info = SetInfo(**description)
        if self.index.dtype not in (INDEX_ROW, INDEX_ROW_WITH_AUDIO) or self.index.shape != (samples,):
            raise ValueError(f"{folder}/index.npy is not the one that set.json was written with: {MAKE_AGAIN}")
        self.has_audio = self.index.dtype == INDEX_ROW_WITH_AUDIO
        for path, size in self._shards:
            if not path.exists():
                raise ValueError(f"{path} is missing: {MAKE_AGAIN}")
            if (found := path.stat().st_size) != size:
                raise ValueError(f"{path} has {found} bytes, its index says {size}: {MAKE_AGAIN}")
        self._open = lru_cache(_OPEN_FILES)(_open)  # a file that falls out closes when its last reader lets go of it

    def __len__(self) -> int:
        return len(self.index)

    @property
    def mean_bytes(self) -> float:
        """Of the latents of a sample."""
        return 2 * self.info.latent_channels * self.total_frames / len(self)

    @property
    def paths(self) -> list[Path]:
        """Of the shards, in their order."""
        return [path for path, _ in self._shards]

    def recomputed_fingerprint(self) -> str:
        """What `fingerprint` is if the index is whole; reads all of it."""
        return fingerprint(self.info, self.index)

    def read(self, ids: NDArray[np.int64], out: NDArray[np.float16]) -> dict[int, DamagedSample]:
        """Read the latents of samples (B,) into rows of `out` (B, at least the longest one's C · frames values).

        The disk is read in one direction, and what lies close together in one go. Returns what could not be read, by
        its row of `out`, which then holds anything.
        """
        rows = self.index[ids]
        sound = well_formed(rows, self.info.latent_channels) & (rows["shard"] < len(self._shards))
        problems = {row: self._index_damaged() for row in np.flatnonzero(~sound).tolist()}
        places = np.lexsort((rows["x0_offset"], rows["shard"]))
        places = places[sound[places]]
        ordered = rows[places]
        shard, begin, length = (ordered[name].astype(np.int64) for name in ("shard", "x0_offset", "x0_length"))
        gap = begin[1:] - (begin + length)[:-1]
        apart = (shard[1:] != shard[:-1]) | (gap < 0) | (gap > _GAP)
        cuts = [0, *(np.flatnonzero(apart) + 1).tolist(), len(places)]
        samples = list(zip(places.tolist(), begin.tolist(), length.tolist(), ordered["x0_crc32"].tolist(), strict=True))
        buffer, stride = out.reshape(-1).view(np.uint8).data, out.strides[0]
        for first, last in pairwise(cuts):
            for some in range(first, last, _BUFFERS // 2):
                run = samples[some : min(last, some + _BUFFERS // 2)]
                problems |= self._read_run(int(shard[first]), run, buffer, stride)
        return problems

    def _read_run(
        self, shard: int, run: list[tuple[int, int, int, int]], buffer: memoryview, stride: int
    ) -> dict[int, DamagedSample]:
        """Samples (row, offset, length, checksum) that lie one behind another, by one read."""
        path, _ = self._shards[shard]
        position = start = run[0][1]
        targets = []
        for row, offset, length, _ in run:
            if offset > position:
                targets.append(memoryview(bytearray(offset - position)))
            targets.append(buffer[row * stride : row * stride + length])
            position = offset + length
        try:
            read = os.preadv(self._open(path).fileno(), targets, start)
        except OSError as error:
            return {row: _damaged(path, offset, str(error)) for row, offset, _, _ in run}
        problems = {}
        for row, offset, length, crc32 in run:
            if offset + length - start > read:
                problems[row] = _damaged(path, offset, "the shard ends too early")
            elif zlib.crc32(buffer[row * stride : row * stride + length]) != crc32:
                problems[row] = _damaged(path, offset, "the checksum is wrong")
        return problems

    def latents(self, ids: Sequence[int] | NDArray[np.int64]) -> list[NDArray[np.float16]]:
        """x0 of each sample, float16 (C, T).

        Raises:
            DamagedSample: a checksum is wrong, or the shard ends too early.
        """
        ids = np.asarray(ids, np.int64)
        frames = self.index["frames"][ids].tolist()
        channels = self.info.latent_channels
        values = np.empty((len(ids), channels * max(frames, default=0)), np.float16)
        for problem in self.read(ids, values).values():
            raise problem
        return [row[: channels * count].reshape(channels, count) for row, count in zip(values, frames, strict=True)]

    def metadata(self, id_: int) -> dict[str, Any]:
        """What `KEY.json` of a sample says; empty where there is none."""
        row = self.index[id_]
        if not row["json_length"]:
            return {}
        path, _ = self._shards[row["shard"]]
        content = pread(self._open(path), row["json_offset"], row["json_length"])
        try:
            return json.loads(content)
        except ValueError as error:
            raise _damaged(path, row["json_offset"], f"no JSON: {error}") from error

    def audio(self, id_: int) -> NDArray[np.float32]:
        """The clip itself, (channels, samples), in sets that hold it."""
        if not self.has_audio:
            raise ValueError(f"{self.folder} holds latents without their audio: take the held-out set")
        row = self.index[id_]
        path, _ = self._shards[row["shard"]]
        content = pread(self._open(path), row["flac_offset"], row["flac_length"])
        if zlib.crc32(content) != row["flac_crc32"]:
            raise _damaged(path, row["flac_offset"], "the checksum is wrong")
        audio, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        return np.ascontiguousarray(audio.T)

    def _index_damaged(self) -> DamagedSample:
        return DamagedSample(f"{self.folder}/index.npy is damaged: {MAKE_AGAIN}")


def _open(path: Path) -> io.FileIO:
    return path.open("rb", buffering=0)


def _damaged(path: Path, offset: int, reason: str) -> DamagedSample:
    return DamagedSample(f"{path} is damaged at byte {offset}: {reason}; {MAKE_AGAIN}")
