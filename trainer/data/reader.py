"""A set, or a part of it, read in its order, with other samples in place of damaged ones."""

from __future__ import annotations

import io
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.order import Order
from trainer.data.shard_set import ShardSet
from trainer.data.shards import DamagedSample
from trainer.files import locked
from trainer.randomness import below

_SUBSTITUTES = 64  # samples tried in place of a damaged one


@dataclass(frozen=True)
class Part:
    """The samples of a set that are read as crops of so many frames: some of them, by `ids` in rising order, or all."""

    frames: int
    ids: NDArray[np.int64] | None = None

    def samples(self, shard_set: ShardSet) -> int:
        """How many they are."""
        return len(shard_set) if self.ids is None else len(self.ids)


def cut(shard_set: ShardSet, lengths: list[int]) -> list[Part]:
    """A set by the smallest of these lengths that a sample fits in; the largest is of all that are longer, too."""
    if len(lengths) == 1:
        return [Part(lengths[0])]
    bucket = np.searchsorted(lengths[:-1], shard_set.index["frames"])
    parts = [Part(length, np.flatnonzero(bucket == number)) for number, length in enumerate(lengths)]
    return [part for part in parts if part.samples(shard_set)]


@dataclass(frozen=True)
class Crop:
    """What to read, columns of B: places in the reader's order, ids, random bits for the crop, rows of the batch."""

    places: NDArray[np.int64]
    ids: NDArray[np.int64]
    bits: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Reader:
    """A part of a set in its order, with other samples in place of damaged ones."""

    shard_set: ShardSet
    part: Part
    order: Order
    damage: Damage

    def ids(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at these places of the order."""
        ids = self.order.ids(places)
        return ids if self.part.ids is None else self.part.ids[ids]

    def read(self, crop: Crop, out: NDArray[np.float16], mask: NDArray[np.bool] | None) -> NDArray[np.int64]:
        """Read into some rows of `out` (b, C, frames), and of `mask`; returns the ids of what lies there then (B,)."""
        channels, frames = out.shape[1:]
        if len(crop.rows) == len(out) and self.shard_set.shortest_frames == self.shard_set.longest_frames == frames:
            return self._fill(crop, out.reshape(len(out), -1))
        values = np.empty((len(crop.rows), channels * self.shard_set.longest_frames), np.float16)
        ids = self._fill(crop, values)
        lengths = self.shard_set.index["frames"][ids].astype(np.int64)
        starts = below(torch.from_numpy(np.maximum(0, lengths - frames) + 1), torch.from_numpy(crop.bits))
        for row, clip, length, start in zip(crop.rows.tolist(), values, lengths.tolist(), starts.tolist(), strict=True):
            cut_CT = clip[: channels * length].reshape(channels, length)[:, start : start + frames]
            out[row, :, : cut_CT.shape[1]] = cut_CT
            if mask is not None:
                out[row, :, length:] = 0
                mask[row, length:] = False
        return ids

    def _fill(self, crop: Crop, values: NDArray[np.float16]) -> NDArray[np.int64]:
        ids = crop.ids.copy()
        for row, problem in self.shard_set.read(ids, values).items():
            self.damage.note(self.shard_set, int(ids[row]), problem)
            ids[row] = self._substitute(int(crop.places[row]), values[row : row + 1])
        return ids

    def _substitute(self, place: int, value: NDArray[np.float16]) -> int:
        """Read the next sound sample of the place's lane instead."""
        for step in range(1, _SUBSTITUTES + 1):
            id_ = self.ids(np.array([place + step * self.order.lanes]))
            problems = self.shard_set.read(id_, value)
            if not problems:
                return int(id_[0])
            self.damage.note(self.shard_set, int(id_[0]), problems[0])
        raise ValueError(f"{_SUBSTITUTES} samples of {self.shard_set.location} in a row can't be read: {problems[0]}")


class Damage:
    """Samples that could not be read, each named once by whoever met it first: a thread, a rank, a run before.

    Args:
        path: of the file that all ranks of a run name them in, a line of JSON each; None: nowhere.
        most: fraction of a set that may be damaged.
    """

    def __init__(self, path: Path | None, most: float):
        self.path, self.most = path, most
        self._known: defaultdict[str, set[int]] = defaultdict(set)  # by the set's location
        self._read = 0  # bytes of the file that are in `_known`
        self._lock = threading.Lock()

    def note(self, shard_set: ShardSet, id_: int, problem: DamagedSample) -> None:
        """Count a sample and write it down, the first time; raises ValueError where they are too many."""
        with self._lock:
            known = self._known[shard_set.location]
            if id_ in known:
                return
            with self._file() as file:
                if id_ not in known:
                    line = {"set": shard_set.location, "sample": id_, "reason": str(problem)}
                    file.write((json.dumps(line) + "\n").encode())
                known.add(id_)
        if len(known) > self.most * len(shard_set):
            raise ValueError(
                f"{len(known)} of {len(shard_set)} samples of {shard_set.location} can't be read, more than "
                f"data.max_damaged={self.most:g} of them. The last: {problem}"
                + (f". Once the set is whole again, remove {self.path}" if self.path else "")
            )

    @contextmanager
    def _file(self) -> Iterator[io.BufferedIOBase]:
        """The file, at its end and locked, once all that others wrote there is known."""
        if self.path is None:
            yield io.BytesIO()
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path), self.path.open("r+b") as file:
            file.seek(self._read)
            line = b"\n"
            for line in file:
                with suppress(ValueError, KeyError):  # a line that was not written to its end
                    entry = json.loads(line)
                    self._known[entry["set"]].add(entry["sample"])
            if not line.endswith(b"\n"):
                file.write(b"\n")
            yield file
            self._read = file.tell()
