"""Batches of random crops: each a pure function of how many samples were seen before it."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.ahead import FetchAhead, Needs
from trainer.data.order import Mixture, Order
from trainer.data.shard_set import ShardSet
from trainer.data.shards import DamagedSample
from trainer.randomness import integers, keys

_SUBSTITUTES = 64  # samples tried in place of a damaged one


@dataclass(frozen=True)
class Batch:
    """A micro-batch of b samples."""

    x0: Tensor
    """(b, C, crop_frames), float16: crops of the samples' latents."""
    positions: Tensor
    """(b,), int64: the samples' places in the stream; all randomness about a sample is keyed by its place."""
    ids: Tensor
    """(b,), int64: the samples' places in their set."""
    sets: Tensor
    """(b,), int64: which of the stream's sets each is from."""


@dataclass(frozen=True)
class Shuffle:
    """How samples are mixed; the fields are `Order`'s, with the window in samples or in MiB."""

    kind: str = "windowed"
    block: int = 64
    window: int | None = None
    window_mib: float = 2048.0
    lanes: int = 64

    def order(self, shard_set: ShardSet, seed: int) -> Order:
        """The order of a set."""
        window = self.window or max(self.block * self.lanes, int(self.window_mib * 2**20 / shard_set.mean_bytes))
        return Order(len(shard_set), shard_set.fingerprint, seed, self.kind, self.block, window, self.lanes)


class LatentStream:
    """The endless stream of one set's samples, or of several sets' by weights; each epoch of a set in another order.

    The global batch after n samples is positions n … n + global_batch - 1, whatever number of ranks and parts it is cut
    into, so n is all there is to save. A rank takes every world_size-th of them.

    A sample that can't be read is replaced by the next of its lane, which is the same on every rank; what is random
    about it is still that of its place. Such samples are written to `errors`, a line of JSON each.

    Raises:
        ValueError: a crop is longer than the shortest clip; the sets' latents are not of one kind; or (while reading)
            more than the fraction `max_damaged` of a set can't be read.
    """

    def __init__(
        self,
        sets: ShardSet | Mapping[ShardSet, int],
        *,
        crop_frames: int,
        global_batch: int,
        seed: int,
        shuffle: Shuffle | None = None,
        errors: Path | None = None,
        max_damaged: float = 0.01,
    ):
        weights = {sets: 1} if isinstance(sets, ShardSet) else sets
        shuffle = shuffle or Shuffle()
        self.sets = list(weights)
        for shard_set in self.sets:
            self._check(shard_set, crop_frames)
        if global_batch < 1:
            raise ValueError(f"the global batch is at least 1, not {global_batch}")
        self.crop_frames, self.global_batch, self.seed = crop_frames, global_batch, seed
        self._mixture = Mixture(tuple(weights.values()), seed, shuffle.lanes)
        damage = _Damage(errors, max_damaged)
        self._readers = [_Reader(shard_set, shuffle.order(shard_set, seed), damage) for shard_set in self.sets]

    def _check(self, shard_set: ShardSet, crop_frames: int) -> None:
        shortest, first = shard_set.shortest_frames, self.sets[0]
        if not 1 <= crop_frames <= shortest:
            raise ValueError(
                f"crops of {crop_frames} frames don't fit the clips of {shard_set.location}, {shortest} frames:"
                f" take crops of 1 to {shortest} frames, or prepare longer clips"
            )
        if shard_set.info.ae_identity != first.info.ae_identity:
            raise ValueError(
                f"{shard_set.location} and {first.location} hold latents of two autoencoders, which can't be mixed: "
                f"prepare both with one"
            )

    def batch(
        self,
        samples_seen: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        part: int = 0,
        parts: int = 1,
        out: Tensor | None = None,
    ) -> Batch:
        """A rank's micro-batch `part` of the global batch after `samples_seen` samples.

        Args:
            samples_seen: where in the stream.
            rank: this one of `world_size`.
            world_size: ranks that share the global batch.
            part: this one of `parts` that the rank takes one after another.
            parts: micro-batches to a global batch on each rank.
            out: (b, C, crop_frames), float16: where `x0` is to lie; None: in memory of its own.

        Raises:
            ValueError: the global batch can't be cut into world_size · parts equal micro-batches, or too much is
                damaged.
        """
        if self.global_batch % (world_size * parts):
            raise ValueError(
                f"a global batch of {self.global_batch} can't be cut into {world_size} ranks × {parts} parts:"
                f" make it a multiple of {world_size * parts}"
            )
        size = self.global_batch // (world_size * parts)
        positions = samples_seen + rank + world_size * np.arange(part * size, (part + 1) * size)
        if out is None:
            out = self._buffer(size, pinned=False)
        sets, ids = self._read(positions, out.numpy())
        return Batch(out, *(torch.from_numpy(part) for part in (positions, ids, sets)))

    def iterate(
        self,
        samples_seen: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        local_ranks: int = 1,
        parts: int = 1,
        ahead: int = 2,
        threads: int = 1,
    ) -> Generator[Batch]:
        """All of a rank's micro-batches from there on, without end, read ahead by threads.

        Remote shards are fetched ahead too, as far as the half of the cache reaches that is for what comes, shared
        among the node's `local_ranks`.

        A batch's `x0` holds until the next batch is asked for: then its memory (pinned, where there is CUDA) is used
        again. The threads end when the iterator is closed, dropped or raises.
        """
        buffers = [self._buffer(self.global_batch // (world_size * parts) or 1) for _ in range(ahead + 1)]

        def read(number: int, start: int, part: int) -> Batch:
            out = buffers[number % len(buffers)]
            return self.batch(start, rank=rank, world_size=world_size, part=part, parts=parts, out=out)

        cuts = ((start, part) for start in count(samples_seen, self.global_batch) for part in range(parts))
        numbered = ((number, *cut) for number, cut in enumerate(cuts))
        fetching = self._fetch_ahead(samples_seen, rank, world_size, local_ranks)
        with fetching as fetch, ThreadPoolExecutor(threads, "latents") as reader, self._interrupted_at_the_end():
            fetch(0)
            under_way = deque(reader.submit(read, *cut) for cut in islice(numbered, ahead))
            for cut in numbered:
                under_way.append(reader.submit(read, *cut))
                yield under_way.popleft().result()
                fetch((cut[0] - ahead) // parts)

    @contextmanager
    def _fetch_ahead(
        self, samples_seen: int, rank: int, world_size: int, local_ranks: int
    ) -> Iterator[Callable[[int], None]]:
        """What is to be told each step, counted from `samples_seen`."""
        caches = [shard_set.cache for shard_set in self.sets if shard_set.cache is not None]
        if not caches:
            yield lambda step: None
            return
        settings = caches[0].settings
        needs = self._needs(samples_seen, rank, world_size)
        share = settings.limit // (2 * local_ranks)
        with FetchAhead(needs, share=share, fetchers=settings.fetchers) as fetching:
            yield fetching.to
        for cache in caches:
            cache.remote.interrupted.clear()

    @contextmanager
    def _interrupted_at_the_end(self) -> Iterator[None]:
        """So that no thread waits on for a network that is away."""
        try:
            yield
        finally:
            for shard_set in self.sets:
                if shard_set.cache is not None:
                    shard_set.cache.remote.interrupted.set()

    def _needs(self, samples_seen: int, rank: int, world_size: int) -> Iterator[Needs]:
        """The remote shards that a rank needs for one global batch after another."""
        for start in count(samples_seen, self.global_batch):
            positions = np.arange(start + rank, start + self.global_batch, world_size)
            sets, places = self._mixture.places(positions)
            needs: Needs = {}
            for number, reader in enumerate(self._readers):
                if reader.shard_set.cache is not None:
                    ids = reader.order.ids(places[sets == number])
                    shards = reader.shard_set.shards_of(ids)
                    needs |= {(reader.shard_set, shard): size for shard, size in shards.items()}
            yield needs

    def _buffer(self, size: int, *, pinned: bool = True) -> Tensor:
        shape = (size, self.sets[0].info.latent_channels, self.crop_frames)
        return torch.empty(shape, dtype=torch.float16, pin_memory=pinned and torch.cuda.is_available())

    def _read(
        self, positions: NDArray[np.int64], out: NDArray[np.float16]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Fill `out` with the crops that stand at these positions; returns each one's set and its id there."""
        crop_keys = keys(self.seed, "crop", torch.from_numpy(positions))
        sets, places = self._mixture.places(positions)
        ids = np.empty_like(positions)
        for number, reader in enumerate(self._readers):
            rows = np.flatnonzero(sets == number)
            if rows.size:
                ids[rows] = reader.read(places[rows], crop_keys[torch.from_numpy(rows)], out, rows)
        return sets, ids


@dataclass(frozen=True)
class _Reader:
    """A set in its order, with other samples in place of damaged ones."""

    shard_set: ShardSet
    order: Order
    damage: _Damage

    def read(
        self, places: NDArray[np.int64], crop_keys: Tensor, out: NDArray[np.float16], rows: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Crops of the samples at these places of the order (B,) into these rows of `out`; returns their ids."""
        channels, crop = out.shape[1:]
        if len(rows) == len(out) and self.shard_set.shortest_frames == self.shard_set.longest_frames == crop:
            return self._fill(places, out.reshape(len(out), -1))
        values = np.empty((len(rows), channels * self.shard_set.longest_frames), np.float16)
        ids = self._fill(places, values)
        frames = self.shard_set.index["frames"][ids].astype(np.int64)
        starts = integers(crop_keys, torch.from_numpy(frames - crop + 1))
        for row, clip, length, start in zip(rows.tolist(), values, frames.tolist(), starts.tolist(), strict=True):
            out[row] = clip[: channels * length].reshape(channels, length)[:, start : start + crop]
        return ids

    def _fill(self, places: NDArray[np.int64], values: NDArray[np.float16]) -> NDArray[np.int64]:
        ids = self.order.ids(places)
        for row, problem in self.shard_set.read(ids, values).items():
            self.damage.note(self.shard_set, int(ids[row]), problem)
            ids[row] = self._substitute(int(places[row]), values[row : row + 1])
        return ids

    def _substitute(self, place: int, value: NDArray[np.float16]) -> int:
        """Read the next sound sample of the place's lane instead."""
        for step in range(1, _SUBSTITUTES + 1):
            id_ = self.order.ids(np.array([place + step * self.order.lanes]))
            problems = self.shard_set.read(id_, value)
            if not problems:
                return int(id_[0])
            self.damage.note(self.shard_set, int(id_[0]), problems[0])
        raise ValueError(f"{_SUBSTITUTES} samples of {self.shard_set.location} in a row can't be read: {problems[0]}")


class _Damage:
    """Samples that could not be read, each named once."""

    def __init__(self, path: Path | None, most: float):
        self.path, self.most = path, most
        self.known: dict[ShardSet, set[int]] = {}

    def note(self, shard_set: ShardSet, id_: int, problem: DamagedSample) -> None:
        known = self.known.setdefault(shard_set, set())
        if id_ in known:
            return
        known.add(id_)
        if self.path is not None:
            line = {"set": shard_set.location, "sample": id_, "reason": str(problem)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, (json.dumps(line) + "\n").encode())  # ranks append whole lines
            finally:
                os.close(descriptor)
        if len(known) > self.most * len(shard_set):
            raise ValueError(
                f"{len(known)} of {len(shard_set)} samples of {shard_set.location} can't be read, more than "
                f"data.max_damaged={self.most:g} of them. The last: {problem}"
            )
