"""Reads a set of shards: samples are read by their row in the index, and each is checked against its checksum."""

from __future__ import annotations

import errno
import io
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soundfile
from isal.isal_zlib import crc32  # the same sum as zlib's, several times as fast
from numpy.typing import NDArray

from models.disk_errors import NO_FILE, PASSING, patiently, with_number
from models.documents import DamagedDocument
from models.readable import describe_os_error
from trainer.data.index_file import CHECKED, is_described, open_mapped, read_whole
from trainer.data.index_row import (
    INDEX_ROWS,
    LONGEST_METADATA,
    OLDER_INDEX_ROWS,
    checked_metadata,
    text_fits,
    well_formed,
)
from trainer.data.local_reads import Memory, Taken, read_each
from trainer.data.places import Places, Reads, plan_reads
from trainer.data.remote import CacheSettings, MissingFileError, NoSetError, ShardCache, is_url
from trainer.data.set_description import read_description
from trainer.data.shards import MAKE_AGAIN, DamagedSample, SetInfo, member_at, pread

Result = TypeVar("Result")

_PAUSES = (0.1, 1.0, 5.0)
"""Seconds to wait before a shard whose disk failed is read again."""
_NO_SUCH_PLACE = NO_FILE | {errno.EINVAL}
"""Errors that come from the set itself: a shard is gone, or an offset is none that a file can have."""
_OPEN_FILES = 512  # shards that one process keeps open
_LARGE_INDEX = 1 << 30  # bytes
_MOST_READ = 256 << 20
"""Bytes up to which an index is read whole; that of a billion samples is not, as each rank would hold it in memory."""


class _NoSuchPlaceError(Exception):
    """A local shard is missing, or has no such offset."""


class ShardSet:
    """A local set, or a remote set that is read through this node's cache.

    Attributes:
        location: the set's folder or URL.
        folder: the local folder with the index.
        info: the facts that all samples share.
        shards: (name, bytes) of each shard.
        fingerprint: a hash of all latents in their order.
        index: one row per sample.
        index_in_memory: whether the index was read whole; otherwise it is mapped, and a row may have to be read.
        total_frames: frames of all clips together.
        shortest_frames, longest_frames: frames of the shortest and the longest clip.
        has_audio, has_text: whether the samples have audio and text.

    Raises:
        NoSetError: the folder is not a set.
        ValueError: the files in the folder do not match the set's index.
    """

    def __init__(self, folder: Path | ShardCache, *, verify: bool = True):
        """`verify`: whether to compare an index that is read whole with its checksum in `set.json`."""
        self.location, self._cache, mend = str(folder), None, MAKE_AGAIN
        if isinstance(folder, ShardCache):
            self.location, self._cache, folder = folder.url, folder, folder.folder
            mend = f"remove {folder} on this node, or {MAKE_AGAIN}"
        self.folder = folder
        try:
            description = read_description(folder, self.location)
            mapped = patiently(lambda: open_mapped(folder / "index.npy"))
        except FileNotFoundError as error:
            remedy = "make the set with `spresso prepare`, or index existing tars with `spresso index`"
            raise NoSetError(f"{error.filename} is missing: {remedy}") from error
        except (OSError, DamagedDocument):
            raise
        except Exception as error:  # numpy evaluates the header of the index as Python, whose errors are of many kinds
            raise ValueError(f"the index of {self.location} is damaged ({error}): {MAKE_AGAIN}") from error
        shards = description.pop("shards")
        self._said = {name: description[name] for name in description.keys() & CHECKED}
        description.pop("checksum", None)
        self.shards: list[tuple[str, int]] = [(shard["name"], shard["bytes"]) for shard in shards]
        self.fingerprint: str = description.pop("fingerprint")
        samples: int = description.pop("samples")
        self.total_frames: int = description.pop("total_frames")
        self.shortest_frames: int = description.pop("shortest_frames")
        self.longest_frames: int = description.pop("longest_frames")
        self.info = SetInfo(**description)
        columns = mapped.dtype.names or ()
        self.has_audio, self.has_text = "flac_offset" in columns, "text_offset" in columns
        as_told = mapped.shape == (samples,) and self.has_text == (self.info.text is not None)
        if mapped.dtype not in (*INDEX_ROWS, *OLDER_INDEX_ROWS) or not as_told:
            raise ValueError(f"{self.location}/index.npy does not match set.json: {mend}")
        self.index_in_memory = mapped.nbytes <= _MOST_READ
        self.index: NDArray[np.void] = read_whole(folder / "index.npy", mapped) if self.index_in_memory else mapped
        if verify and self.index_in_memory and not self.has_own_index():
            raise ValueError(f"{self.location}/index.npy does not match set.json: {mend}")
        for name, size in self.shards if self._cache is None else ():
            try:
                # faster than Path.stat, for a hundred thousand shards
                found = patiently(partial(os.stat, f"{folder}/{name}")).st_size
            except FileNotFoundError:
                raise ValueError(f"{folder}/{name} is missing: {MAKE_AGAIN}") from None
            if found != size:
                raise ValueError(f"{folder}/{name} has {found} bytes, but set.json says {size}: {MAKE_AGAIN}")
        names = [f"{folder}/{name}" for name, _ in self.shards]
        # A file that is evicted closes when its last reader releases it.
        self._open = lru_cache(_OPEN_FILES)(lambda shard: io.FileIO(names[shard]))
        if isinstance(self.index.base, mmap.mmap) and self.index.nbytes > _LARGE_INDEX:
            self.index.base.madvise(mmap.MADV_RANDOM)  # rows are read at random, so the kernel's readahead is useless

    def __len__(self) -> int:
        return len(self.index)

    @property
    def mean_bytes(self) -> float:
        """The mean number of bytes in a sample's latents."""
        return 2 * self.info.latent_channels * self.total_frames / len(self)

    @property
    def paths(self) -> list[Path]:
        """The paths of the shards, in their order."""
        return [self.folder / name for name, _ in self.shards]

    def has_own_index(self) -> bool:
        """Whether the index, which is read whole, is the one that `set.json` was written for."""
        return is_described(self.index, self.info, self.shards, self._said)

    def read(self, ids: NDArray[np.int64], out: NDArray[np.float16]) -> dict[int, DamagedSample]:
        """Read the latents of samples into the rows of `out`.

        Samples are read in the order of the index, and those that are close together with one system call.

        Args:
            ids: (B,), the samples' rows in the index.
            out: (B, n), n at least C · frames of the longest sample, contiguous.

        Returns:
            The problem of each sample that could not be read, by its row of `out`. The content of such a row is
            undefined.
        """
        rows = np.arange(len(ids))
        (reads,) = self.plan_reads(ids, rows, np.zeros_like(rows), 1, row_bytes=out.shape[1] * out.itemsize)
        return self.read_planned(reads, out)

    def plan_reads(
        self, ids: NDArray[np.int64], rows: NDArray[np.int64], batches: NDArray[np.int64], count: int, *, row_bytes: int
    ) -> list[Reads]:
        """Plan the reads of `count` batches, which costs far less for many batches at once than for each of them.

        Args:
            ids: (n,), the samples of all batches as rows of the index.
            rows: (n,), the samples' rows in their batches.
            batches: (n,), each sample's batch, 0 … count - 1.
            row_bytes: the bytes of a row of a batch.
        """

        def fits(found: Mapping[str, NDArray[Any]]) -> NDArray[np.bool]:
            known = (found["shard"] < len(self.shards)) & (found["x0_length"] <= row_bytes)
            return well_formed(found, self.info.latent_channels) & known

        return plan_reads(self.index, ids, rows=rows, batches=batches, count=count, fits=fits, row_bytes=row_bytes)

    def read_planned(
        self, reads: Reads, out: NDArray[np.float16], taken: Taken | None = None
    ) -> dict[int, DamagedSample]:
        """Do as `read` does, for reads that `plan_reads` planned for rows as long as those of `out`.

        `taken` takes each sample out of `out` once it is read; without it, each stays in its row.
        """
        memory = Memory(out.reshape(-1).view(np.uint8).data, out.strides[0], taken)
        problems = {row: self._index_damaged() for row in reads.damaged}
        # `_read_run` finds out the reasons of failures, and reads the samples of a remote set.
        failed = read_each(reads.alone, memory, self._open) if self._cache is None else range(len(reads.alone))
        for number in failed:
            problems |= self._read_run(reads.alone.part(number, number + 1), memory)
        for run in reads.runs:
            problems |= self._read_run(run, memory)
        return problems

    def _read_run(self, places: Places, memory: Memory) -> dict[int, DamagedSample]:
        """Read samples at rising offsets of one shard with one system call.

        Returns the problem of each sample that could not be read, by its row. Raises OSError if the disk fails, because
        the samples may be whole.
        """
        run = list(places)
        shard, first, *_ = run[0]
        position, targets = first, []
        for _, offset, length, _, start, end in run:
            if offset > position:
                targets.append(memoryview(bytearray(offset - position)))
            targets.append(memory.buffer[start:end])
            position = offset + length
        try:
            read = self._patiently(shard, lambda file: os.preadv(file.fileno(), targets, first))
        except (_NoSuchPlaceError, MissingFileError) as error:
            return {memory.row(start): self._damaged(shard, offset, str(error)) for _, offset, _, _, start, _ in run}
        problems = {}
        for _, offset, length, checksum, start, end in run:
            if offset + length - first > read:
                problems[memory.row(start)] = self._damaged(shard, offset, "the shard is truncated")
            elif crc32(memory.buffer[start:end]) != checksum:
                problems[memory.row(start)] = self._damaged(shard, offset, "the checksum is wrong")
            elif memory.taken:
                memory.taken(memory.row(start), start)
        return problems

    @property
    def cache(self) -> ShardCache | None:
        """The cache through which a remote set is read, or None for a local set."""
        return self._cache

    def shards_of(self, ids: NDArray[np.int64]) -> dict[int, int]:
        """Return shard → bytes for all shards that hold these samples, in the order of each shard's first sample."""
        shards = self.index["shard"][ids]
        known = shards[shards < len(self.shards)].tolist()  # `read` reports a damaged index
        return {shard: self.shards[shard][1] for shard in dict.fromkeys(known)}

    def fetch(self, shard: int) -> None:
        """Fetch a remote shard into the cache and mark it as just used; raises what reading the shard would raise."""
        with self._file(shard):
            pass

    def latents(self, ids: Sequence[int] | NDArray[np.int64]) -> list[NDArray[np.float16]]:
        """Return x0 of each sample, float16 (C, T).

        Raises:
            DamagedSample: a checksum is wrong, or the shard is truncated.
        """
        ids = np.asarray(ids, np.int64)
        frames = self.index["frames"][ids].tolist()
        channels = self.info.latent_channels
        values = np.empty((len(ids), channels * max(frames, default=0)), np.float16)
        for problem in self.read(ids, values).values():
            raise problem
        return [row[: channels * count].reshape(channels, count) for row, count in zip(values, frames, strict=True)]

    def metadata(self, id_: int) -> dict[str, Any]:
        """Return the content of a sample's `KEY.json`, or an empty dict if the sample has none.

        Raises:
            DamagedSample: the content is not what was indexed, or not a JSON object, or the shard is missing.
        """
        row = self.index[id_]
        if row["json_length"] > LONGEST_METADATA:
            raise self._index_damaged()
        content = self._content(row, "json") if row["json_length"] else b""
        try:
            return checked_metadata(row, content)
        except ValueError as error:
            if not content:
                raise self._index_damaged() from error
            shard, offset = row["shard"], row["json_offset"]
            name = member_at(self.paths[shard], offset) or f"the metadata of sample {id_}"
            raise self._damaged(shard, offset, f"{name} {error}") from error

    def text(self, id_: int) -> NDArray[np.float16]:
        """Return a sample's caption as D reads it, (tokens, width), from a set that holds text.

        Raises:
            DamagedSample: the checksum is wrong, or the shard is truncated or missing.
        """
        assert self.info.text is not None
        row = self.index[id_]
        if row["shard"] >= len(self.shards) or not text_fits(self.index[id_ : id_ + 1], self.info.text).all():
            raise self._index_damaged()
        content = self._content(row, "text")
        if crc32(content) != row["text_crc32"]:
            raise self._damaged(row["shard"], row["text_offset"], "the checksum of the text is wrong")
        return np.frombuffer(content, np.float16).reshape(-1, self.info.text["width"])

    def audio(self, id_: int) -> NDArray[np.float32]:
        """Return a sample's audio, (channels, samples), from a set that holds audio.

        Raises:
            DamagedSample: the checksum is wrong, the audio can't be decoded, or the shard is missing.
            ValueError: the set holds no audio.
        """
        if not self.has_audio:
            raise ValueError(
                f"{self.location} holds latents without their audio, which evaluation needs: add each sample's audio "
                f"to the tars as KEY.flac and run `spresso index`"
            )
        row = self.index[id_]
        content = self._content(row, "flac")
        if crc32(content) != row["flac_crc32"]:
            raise self._damaged(row["shard"], row["flac_offset"], "the checksum is wrong")
        try:
            audio, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        except (RuntimeError, MemoryError) as error:  # not enough memory: the header claims too many samples
            reason = f"its audio can't be decoded: {error}"
            raise self._damaged(row["shard"], row["flac_offset"], reason) from error
        return np.ascontiguousarray(audio.T)

    def _content(self, row: np.void, kind: str) -> bytes:
        """Return the content of a sample's member as the index locates it, without comparing its checksum."""
        shard, offset, length = (int(row[name]) for name in ("shard", f"{kind}_offset", f"{kind}_length"))
        if shard >= len(self.shards) or offset + length > self.shards[shard][1]:
            raise self._index_damaged()
        try:
            return self._patiently(shard, lambda file: pread(file, offset, length))
        except (_NoSuchPlaceError, MissingFileError) as error:
            raise self._damaged(shard, offset, str(error)) from error

    def _patiently(self, shard: int, read: Callable[[io.FileIO], Result]) -> Result:
        """Call `read` with the open shard, and again after a pause if the disk fails.

        Raises:
            _NoSuchPlaceError, MissingFileError: the shard is gone, or has no such offset.
            OSError: the disk failed each time. The samples may be whole, so none may be replaced.
        """
        pauses = iter(_PAUSES)
        while True:
            try:
                with self._file(shard) as file:
                    return read(file)
            except OSError as error:
                if error.errno in _NO_SUCH_PLACE:
                    raise _NoSuchPlaceError(str(error)) from error
                pause = next(pauses, None)
                if pause is None or error.errno not in PASSING:
                    path = str(self.paths[shard])
                    named = OSError(error.errno, error.strerror, path) if error.strerror else error
                    reason = describe_os_error(named)
                    raise with_number(
                        error.errno, f"{reason}. No sample is replaced for that: repeat the command once it can be read"
                    ) from error
            self._open.cache_clear()  # a file that was opened before its server went away stays unreadable
            time.sleep(pause)

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
    """Open a set by its folder or its URL.

    Raises:
        ValueError: see `ShardSet` and `ShardCache`.
    """
    if not is_url(location):
        return ShardSet(Path(location))
    return ShardSet(ShardCache(location, cache or CacheSettings()))


def open_training_set(location: str, cache: CacheSettings | None = None) -> ShardSet:
    """Open the set `train/` below a folder or a URL, or the folder or URL itself if that is a set.

    Raises:
        ValueError: see `open_set`.
    """
    try:
        return open_set(f"{location.rstrip('/')}/train", cache)
    except NoSetError as error:
        try:
            return open_set(location, cache)
        except NoSetError:
            raise error from None
