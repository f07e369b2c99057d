"""Reads crops from a set, or from a part of a set, in its order; damaged samples are replaced."""

from __future__ import annotations

import io
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from models.documents import Natural, parse_json, to_json
from trainer.data.crops import Crop, Cuts, Planned, draw_spans
from trainer.data.order import Order
from trainer.data.places import Reads
from trainer.data.shard_set import ShardSet
from trainer.data.shards import DamagedSample
from trainer.files import locked

_SUBSTITUTES = 64  # the number of samples tried as a replacement for a damaged one


@dataclass(frozen=True)
class Part:
    """The samples of a set that are read as crops of the same length."""

    frames: int
    """The length of the crops."""
    ids: NDArray[np.int64] | None = None
    """The samples, in rising order; None means all samples of the set."""

    def samples(self, shard_set: ShardSet) -> int:
        """Return the number of samples in the part."""
        return len(shard_set) if self.ids is None else len(self.ids)


def cut(shard_set: ShardSet, lengths: list[int]) -> list[Part]:
    """Split a set by length: each sample goes to the smallest of the `lengths` (frames, rising) that it fits in.

    Samples that exceed the largest length go to that length, too. Empty parts are left out.
    """
    if len(lengths) == 1:
        return [Part(lengths[0])]
    bucket = np.searchsorted(lengths[:-1], shard_set.index["frames"])
    parts = [Part(length, np.flatnonzero(bucket == number)) for number, length in enumerate(lengths)]
    return [part for part in parts if part.samples(shard_set)]


@dataclass(frozen=True)
class Reader:
    """Reads crops of the samples of one part in its order; damaged samples are replaced."""

    shard_set: ShardSet
    part: Part
    order: Order
    damage: Damage

    @property
    def reads_whole_clips(self) -> bool:
        """Whether every clip of the set is as long as a crop."""
        return self.shard_set.shortest_frames == self.shard_set.longest_frames == self.part.frames

    def ids(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the samples (B,) at these places (B,) of the order."""
        ids = self.order.ids(places)
        return ids if self.part.ids is None else self.part.ids[ids]

    def plan(
        self,
        ids: NDArray[np.int64],
        bits: NDArray[np.int64],
        batches: NDArray[np.int64],
        count: int,
        *,
        channels: int,
    ) -> list[Planned]:
        """Plan the reads and the crops of `count` batches, which costs far less for many at once than for each of them.

        Args:
            ids: (n,), the samples in the order of their batches.
            bits: (n,), 64 random bits for the start of each crop.
            batches: (n,), each sample's batch, 0 … count - 1.
            count: the number of batches.
            channels: C.
        """
        bounds = np.searchsorted(batches, np.arange(count + 1))
        rows = np.arange(len(ids)) - bounds[batches]
        reads = self.shard_set.plan_reads(ids, rows, batches, count, row_bytes=self._row_bytes(channels))
        spans = draw_spans(self.shard_set, ids, bits, self.part.frames)
        parts = (spans.part(start, end) for start, end in pairwise(bounds.tolist()))
        return [Planned(*planned) for planned in zip(reads, parts, strict=True)]

    def _row_bytes(self, channels: int) -> int:
        """Return the bytes of the set's longest clip."""
        return 2 * channels * self.shard_set.longest_frames

    def read(self, crop: Crop, out: NDArray[np.float16], mask: NDArray[np.bool] | None) -> NDArray[np.int64]:
        """Read crops into rows of a batch.

        Args:
            crop: the samples and the rows.
            out: (b, C, frames).
            mask: (b, frames), true on entry; set to false where a sample is padded. None: no sample is padded.

        Returns:
            (B,), the ids of the samples that were read: those of `crop`, except for replaced samples.
        """
        channels = out.shape[1]
        (planned,) = (
            [crop.planned]
            if crop.planned
            else self.plan(crop.ids, crop.bits, np.zeros_like(crop.ids), 1, channels=channels)
        )
        # If the crops fill the batch and every clip is as long as a crop, read directly into the batch.
        if len(crop.rows) == len(out) and self.reads_whole_clips:
            return self._fill(crop, planned.reads, out.reshape(len(out), -1))
        clips = np.empty((len(crop.rows), self._row_bytes(channels) // 2), np.float16)
        return self._fill(crop, planned.reads, clips, Cuts(clips, planned.spans, crop.rows, out, mask))

    def _fill(
        self, crop: Crop, reads: Reads, values: NDArray[np.float16], cuts: Cuts | None = None
    ) -> NDArray[np.int64]:
        """Read samples into the rows of `values`, from where `cuts` cuts each of them; returns the samples' ids."""
        ids = crop.ids.copy()
        for row, problem in self.shard_set.read_planned(reads, values, cuts).items():
            self.damage.note(self.shard_set, int(ids[row]), problem)
            ids[row] = self._substitute(int(crop.places[row]), values[row : row + 1])
            if cuts is not None:
                one = slice(row, row + 1)
                cuts.replace(row, draw_spans(self.shard_set, ids[one], crop.bits[one], self.part.frames))
        return ids

    def _substitute(self, place: int, value: NDArray[np.float16]) -> int:
        """Read the next undamaged sample of the place's lane into `value` and return its id."""
        for step in range(1, _SUBSTITUTES + 1):
            id_ = self.ids(np.array([place + step * self.order.lanes]))
            problems = self.shard_set.read(id_, value)
            if not problems:
                return int(id_[0])
            self.damage.note(self.shard_set, int(id_[0]), problems[0])
        raise ValueError(
            f"{_SUBSTITUTES} consecutive samples of {self.shard_set.location} can't be read ({problems[0]}): find the "
            f"damaged shards with `spresso index DIR --verify` and restore them"
        )


class _DamageEntry(TypedDict):
    set: str
    sample: Natural


class Damage:
    """Logs the samples that could not be read, each once across all threads, ranks and earlier runs.

    Args:
        path: the log that all ranks of a run share, one line of JSON per sample; None disables the log.
        most: the fraction of a set that may be damaged.
    """

    def __init__(self, path: Path | None, most: float):
        self.path, self.most = path, most
        self._known: defaultdict[str, set[int]] = defaultdict(set)  # by the set's location
        self._bytes_read = 0  # the length of the log's beginning whose entries are in `_known`
        self._lock = threading.Lock()

    def note(self, shard_set: ShardSet, id_: int, problem: DamagedSample) -> None:
        """Count and log a sample that is new; raises ValueError if too many samples of the set are damaged."""
        with self._lock:
            known = self._known[shard_set.location]
            if id_ in known:
                return
            with self._updated_log() as file:
                if id_ not in known:
                    line = {"set": shard_set.location, "sample": id_, "reason": str(problem)}
                    file.write((to_json(line) + "\n").encode())
                known.add(id_)
        if len(known) > self.most * len(shard_set):
            raise ValueError(
                f"{len(known)} of {len(shard_set)} samples of {shard_set.location} can't be read, which exceeds the "
                f"fraction data.max_damaged={self.most:g}. The last: {problem}"
                + (f". Once the set is repaired, remove {self.path}" if self.path else "")
            )

    @contextmanager
    def _updated_log(self) -> Iterator[io.BufferedIOBase]:
        """Lock the log, add the entries of other processes to `_known`, and yield the log positioned at its end."""
        if self.path is None:
            yield io.BytesIO()
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path} is not a file: remove it")
        with locked(self.path), self.path.open("r+b") as file:
            file.seek(self._bytes_read)
            line = b"\n"
            for line in file:
                with suppress(ValueError):  # skip a line that was not written completely
                    entry = parse_json(line, _DamageEntry, self.path, mend="")
                    self._known[entry["set"]].add(entry["sample"])
            if not line.endswith(b"\n"):
                file.write(b"\n")
            yield file
            self._bytes_read = file.tell()
