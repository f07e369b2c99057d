"""A set of shards to read from: samples by their place in the index, each checked as it is read."""

from __future__ import annotations

import io
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from isal.isal_zlib import crc32  # the same sum as zlib's, several times as fast
from numpy.typing import NDArray

from trainer.data.remote import CacheSettings, MissingFileError, NoSetError, ShardCache, is_url
from trainer.data.shards import (
    INDEX_ROWS,
    MAKE_AGAIN,
    SET_VERSION,
    DamagedSample,
    SetInfo,
    pread,
    set_fingerprint,
    text_fits,
    well_formed,
)

_OPEN_FILES = 512  # shards that one process keeps open
_LARGE_INDEX = 1 << 30  # bytes
_GAP = 16 << 10  # bytes between two samples that are cheaper to read than to leave out
_BUFFERS = 512  # to one read; Linux takes 1024


class ShardSet:
    """A folder of shards with its index, or one that lies elsewhere, by way of this node's cache.

    Attributes: `location`, the folder or its URL; `folder`, where the index is here; `info` (`SetInfo`); `shards`,
    their names and bytes; `fingerprint`, a hash of all latents in their order; `index`, the rows; `total_frames`;
    `shortest_frames` and `longest_frames`, of the clips; `has_audio`; `has_text`.

    Raises:
        NoSetError: the folder is not a set.
        ValueError: its files are not those that its index was made from.
    """

    def __init__(self, folder: Path | ShardCache):
        self.location, self._cache = str(folder), None
        if isinstance(folder, ShardCache):
            self.location, self._cache, folder = folder.url, folder, folder.folder
        self.folder = folder
        try:
            description = json.loads((folder / "set.json").read_text(encoding="utf-8"))
            self.index = np.lib.format.open_memmap(folder / "index.npy", mode="r")
        except FileNotFoundError as error:
            mend = "make the set with `spresso prepare`, or of tars that are there with `spresso index`"
            raise NoSetError(f"{error.filename} is missing: {mend}") from error
        except ValueError as error:
            raise ValueError(f"the index of {self.location} is damaged ({error}): {MAKE_AGAIN}") from error
        if description.pop("version", None) != SET_VERSION:
            raise ValueError(f"{self.location}/set.json is of another version of this program: {MAKE_AGAIN}")
        shards = description.pop("shards")
        if strays := [shard["name"] for shard in shards if Path(shard["name"]).name != shard["name"]]:
            raise ValueError(f"{self.location}/set.json names a shard outside of its folder: {strays[0]}")
        self.shards: list[tuple[str, int]] = [(shard["name"], shard["bytes"]) for shard in shards]
        self.fingerprint: str = description.pop("fingerprint")
        samples: int = description.pop("samples")
        self.total_frames: int = description.pop("total_frames")
        self.shortest_frames: int = description.pop("shortest_frames")
        self.longest_frames: int = description.pop("longest_frames")
        self.info = SetInfo(**description)
        columns = self.index.dtype.names or ()
        self.has_audio, self.has_text = "flac_offset" in columns, "text_offset" in columns
        if (
            self.index.dtype not in INDEX_ROWS
            or self.index.shape != (samples,)
            or self.has_text != (self.info.text is not None)
        ):
            raise ValueError(f"{self.location}/index.npy is not the one that set.json was written with: {MAKE_AGAIN}")
        for name, size in self.shards if self._cache is None else ():
            try:
                found = os.stat(f"{folder}/{name}").st_size  # noqa: PTH116 (there may be a hundred thousand)
            except FileNotFoundError:
                raise ValueError(f"{folder}/{name} is missing: {MAKE_AGAIN}") from None
            if found != size:
                raise ValueError(f"{folder}/{name} has {found} bytes, its index says {size}: {MAKE_AGAIN}")
        names = [f"{folder}/{name}" for name, _ in self.shards]
        # a file that falls out closes when its last reader lets go of it
        self._open = lru_cache(_OPEN_FILES)(lambda shard: io.FileIO(names[shard]))
        if isinstance(self.index.base, mmap.mmap) and self.index.nbytes > _LARGE_INDEX:
            self.index.base.madvise(mmap.MADV_RANDOM)  # what the kernel would read ahead of a row is of no use

    def __len__(self) -> int:
        return len(self.index)

    @property
    def mean_bytes(self) -> float:
        """Of the latents of a sample."""
        return 2 * self.info.latent_channels * self.total_frames / len(self)

    @property
    def paths(self) -> list[Path]:
        """Of the shards, in their order."""
        return [self.folder / name for name, _ in self.shards]

    def recomputed_fingerprint(self) -> str:
        """What `fingerprint` is if the index is whole; reads all of it."""
        return set_fingerprint(self.info, self.index)

    def read(self, ids: NDArray[np.int64], out: NDArray[np.float16]) -> dict[int, DamagedSample]:
        """Read the latents of samples (B,) into rows of `out` (B, at least the longest one's C · frames values).

        The disk is read in one direction, and what lies close together in one go. Returns what could not be read, by
        its row of `out`, which then holds anything.
        """
        rows = self.index[ids]
        sound = well_formed(rows, self.info.latent_channels) & (rows["shard"] < len(self.shards))
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
            if last - first == 1 and self._read_one(int(shard[first]), samples[first], buffer, stride):
                continue
            for some in range(first, last, _BUFFERS // 2):
                run = samples[some : min(last, some + _BUFFERS // 2)]
                problems |= self._read_run(int(shard[first]), run, buffer, stride)
        return problems

    def _read_one(self, shard: int, sample: tuple[int, int, int, int], buffer: memoryview, stride: int) -> bool:
        """Whether a sample (row, offset, length, checksum) was read and is sound: the hot path of a shuffled order."""
        if self._cache is not None:
            return False
        row, offset, length, checksum = sample
        values = buffer[row * stride : row * stride + length]
        try:
            return os.preadv(self._open(shard).fileno(), [values], offset) == length and crc32(values) == checksum
        except OSError:
            return False

    def _read_run(
        self, shard: int, run: list[tuple[int, int, int, int]], buffer: memoryview, stride: int
    ) -> dict[int, DamagedSample]:
        """Samples (row, offset, length, checksum) that lie one behind another, by one read."""
        position = start = run[0][1]
        targets = []
        for row, offset, length, _ in run:
            if offset > position:
                targets.append(memoryview(bytearray(offset - position)))
            targets.append(buffer[row * stride : row * stride + length])
            position = offset + length
        try:
            with self._file(shard) as file:
                read = os.preadv(file.fileno(), targets, start)
        except (OSError, MissingFileError) as error:
            return {row: self._damaged(shard, offset, str(error)) for row, offset, _, _ in run}
        problems = {}
        for row, offset, length, checksum in run:
            if offset + length - start > read:
                problems[row] = self._damaged(shard, offset, "the shard ends too early")
            elif crc32(buffer[row * stride : row * stride + length]) != checksum:
                problems[row] = self._damaged(shard, offset, "the checksum is wrong")
        return problems

    @property
    def cache(self) -> ShardCache | None:
        """What a remote set's shards are fetched by."""
        return self._cache

    def shards_of(self, ids: NDArray[np.int64]) -> dict[int, int]:
        """The shards that samples lie in, in the order of their first sample, with their bytes."""
        shards = self.index["shard"][ids]
        known = shards[shards < len(self.shards)].tolist()  # a damaged index is reported where it is read
        return {shard: self.shards[shard][1] for shard in dict.fromkeys(known)}

    def fetch(self, shard: int) -> None:
        """Have a remote shard here, and used last; raises what reading it would raise."""
        with self._file(shard):
            pass

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
        with self._file(row["shard"]) as file:
            content = pread(file, row["json_offset"], row["json_length"])
        try:
            return json.loads(content)
        except ValueError as error:
            raise self._damaged(row["shard"], row["json_offset"], f"no JSON: {error}") from error

    def text(self, id_: int) -> NDArray[np.float16]:
        """A sample's caption as D reads it, (tokens, width), in sets that hold text.

        Raises:
            DamagedSample: a checksum is wrong, or the shard ends too early or is away.
        """
        assert self.info.text is not None
        row = self.index[id_]
        if row["shard"] >= len(self.shards) or not text_fits(self.index[id_ : id_ + 1], self.info.text).all():
            raise self._index_damaged()
        try:
            with self._file(row["shard"]) as file:
                content = pread(file, row["text_offset"], row["text_length"])
        except (OSError, MissingFileError) as error:
            raise self._damaged(row["shard"], row["text_offset"], str(error)) from error
        if crc32(content) != row["text_crc32"]:
            raise self._damaged(row["shard"], row["text_offset"], "the checksum of its text is wrong")
        return np.frombuffer(content, np.float16).reshape(-1, self.info.text["width"])

    def audio(self, id_: int) -> NDArray[np.float32]:
        """The clip itself, (channels, samples), in sets that hold it."""
        if not self.has_audio:
            raise ValueError(
                f"{self.location} holds latents without their audio, which figures need: add it as KEY.flac"
            )
        row = self.index[id_]
        with self._file(row["shard"]) as file:
            content = pread(file, row["flac_offset"], row["flac_length"])
        if crc32(content) != row["flac_crc32"]:
            raise self._damaged(row["shard"], row["flac_offset"], "the checksum is wrong")
        audio, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        return np.ascontiguousarray(audio.T)

    @contextmanager
    def _file(self, shard: int) -> Iterator[io.FileIO]:
        if self._cache is None:
            yield self._open(shard)
        else:
            with self._cache.open(*self.shards[shard]) as file:
                yield file

    def _damaged(self, shard: int, offset: int, reason: str) -> DamagedSample:
        path = f"{self.location}/{self.shards[shard][0]}"
        return DamagedSample(f"{path} is damaged at byte {offset}: {reason}; {MAKE_AGAIN}")

    def _index_damaged(self) -> DamagedSample:
        return DamagedSample(f"{self.location}/index.npy is damaged: {MAKE_AGAIN}")


def open_set(location: str, cache: CacheSettings | None = None) -> ShardSet:
    """A set by its folder or its URL.

    Raises:
        ValueError: as `ShardSet` and `ShardCache` do.
    """
    if not is_url(location):
        return ShardSet(Path(location))
    return ShardSet(ShardCache(location, cache or CacheSettings()))


def open_training_set(location: str, cache: CacheSettings | None = None) -> ShardSet:
    """The `train/` of a folder or a URL, or, where that is a set itself, that.

    Raises:
        ValueError: as `open_set` does.
    """
    try:
        return open_set(f"{location.rstrip('/')}/train", cache)
    except NoSetError as error:
        try:
            return open_set(location, cache)
        except NoSetError:
            raise error from None
