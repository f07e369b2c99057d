"""Batches of random crops: each a pure function of how many samples were seen before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, count, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.ahead import FetchAhead, Needs
from trainer.data.order import Buckets, Mixture, Order
from trainer.data.reader import Damage, Part, Reader, cut
from trainer.data.shard_set import ShardSet
from trainer.randomness import keys


@dataclass(frozen=True)
class Batch:
    """A micro-batch of b samples."""

    x0: Tensor
    """(b, C, frames), float16: crops of the samples' latents, 0 behind the end of those that are shorter."""
    positions: Tensor
    """(b,), int64: the samples' places in the stream; all randomness about a sample is keyed by its place."""
    ids: Tensor
    """(b,), int64: the samples' places in their set."""
    sets: Tensor
    """(b,), int64: which of the stream's sets each is from."""
    mask: Tensor | None = None
    """(b, frames), bool: true where a frame is the sample's own. None: all are."""


@dataclass(frozen=True)
class Shuffle:
    """How samples are mixed; the fields are `Order`'s, with the window in samples or in MiB."""

    kind: str = "windowed"
    block: int = 64
    window: int | None = None
    window_mib: float = 2048.0
    lanes: int = 64

    def order(self, shard_set: ShardSet, seed: int, part: Part | None = None) -> Order:
        """The order of a set, or of a part of it."""
        part = part or Part(0)
        window = self.window or max(self.block * self.lanes, int(self.window_mib * 2**20 / shard_set.mean_bytes))
        fingerprint = shard_set.fingerprint + (f":{part.frames}" if part.ids is not None else "")
        return Order(part.samples(shard_set), fingerprint, seed, self.kind, self.block, window, self.lanes)


class LatentStream:
    """The endless stream of one set's samples, or of several sets' by weights; each epoch of a set in another order.

    The global batch after n samples is positions n … n + global_batch - 1, whatever number of ranks and parts it is cut
    into, so n is all there is to save. A rank takes every world_size-th of them.

    Samples are cropped to `crop_frames`. With `buckets`, lengths below that, a batch has the length of one of them or
    `crop_frames`: it holds samples that are as long at most, and longer than the next smaller one, and a mask tells
    their frames from the padding. It is then of one set; which one, goes by the weights.

    A sample that can't be read is replaced by the next of its lane, which is the same on every rank; what is random
    about it is still that of its place. Such samples are written to `errors`, a line of JSON each.

    Raises:
        ValueError: a crop is longer than the shortest clip and there are no buckets; the sets' latents are not of one
            kind; or (while reading) more than the fraction `max_damaged` of a set can't be read.
    """

    def __init__(
        self,
        sets: ShardSet | Mapping[ShardSet, int],
        *,
        crop_frames: int,
        global_batch: int,
        seed: int,
        shuffle: Shuffle | None = None,
        buckets: Sequence[int] = (),
        errors: Path | None = None,
        max_damaged: float = 0.01,
    ):
        weights = {sets: 1} if isinstance(sets, ShardSet) else sets
        shuffle = shuffle or Shuffle()
        self.sets = list(weights)
        self.crop_frames, self.global_batch, self.seed = crop_frames, global_batch, seed
        lengths = sorted({length for length in buckets if 0 < length < crop_frames} | {crop_frames})
        if global_batch < 1:
            raise ValueError(f"the global batch is at least 1, not {global_batch}")
        self._padded = bool(buckets)
        for shard_set in self.sets:
            self._check(shard_set)
        damage = Damage(errors, max_damaged)
        parts = {shard_set: cut(shard_set, lengths if self._padded else [crop_frames]) for shard_set in self.sets}
        self._readers = [
            Reader(shard_set, part, shuffle.order(shard_set, seed, part), damage)
            for shard_set, of_set in parts.items()
            for part in of_set
        ]
        self._first_reader = list(accumulate(map(len, parts.values()), initial=0))  # of each set
        self._mixture = Mixture(tuple(weights.values()), seed, lanes=1 if self._padded else shuffle.lanes)
        self._buckets = [
            Buckets(tuple(part.samples(shard_set) for part in of_set), global_batch, seed)
            for shard_set, of_set in parts.items()
        ]

    def _check(self, shard_set: ShardSet) -> None:
        shortest, first = shard_set.shortest_frames, self.sets[0]
        if self.crop_frames < 1 or (self.crop_frames > shortest and not self._padded):
            raise ValueError(
                f"crops of {self.crop_frames} frames don't fit the clips of {shard_set.location}, {shortest} frames:"
                f" take crops of 1 to {shortest} frames, prepare longer clips, or give data.buckets=[…]"
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
            out: float16, contiguous, of at least b · C · crop_frames numbers: where `x0` is to lie; None: in memory of
                its own.

        Raises:
            ValueError: the global batch can't be cut into world_size · parts equal micro-batches, or too much is
                damaged.
        """
        if self.global_batch % (world_size * parts):
            raise ValueError(
                f"a global batch of {self.global_batch} can't be cut into {world_size} ranks × {parts} parts:"
                f" make it a multiple of {world_size * parts}"
            )
        if self._padded and samples_seen % self.global_batch:
            raise ValueError(f"with buckets, batches begin at multiples of {self.global_batch}, not at {samples_seen}")
        size = self.global_batch // (world_size * parts)
        positions = samples_seen + rank + world_size * np.arange(part * size, (part + 1) * size)
        if out is None:
            out = self._buffer(size, pinned=False)
        readers, places = self._deal(positions)
        frames = self._readers[int(readers[0])].part.frames  # the same for all
        x0 = out.view(-1)[: size * out.shape[1] * frames].view(size, -1, frames)
        mask = np.ones((size, frames), bool) if self._padded else None
        ids = self._read(positions, readers, places, x0.numpy(), mask)
        sets = np.searchsorted(self._first_reader, readers, side="right") - 1
        return Batch(
            x0,
            torch.from_numpy(positions),
            torch.from_numpy(ids),
            torch.from_numpy(sets),
            mask=None if mask is None or mask.all() else torch.from_numpy(mask),
        )

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
            readers, places = self._deal(positions)
            needs: Needs = {}
            for number in np.unique(readers).tolist():
                shard_set = self._readers[number].shard_set
                if shard_set.cache is not None:
                    shards = shard_set.shards_of(self._readers[number].ids(places[readers == number]))
                    needs |= {(shard_set, shard): size for shard, size in shards.items()}
            yield needs

    def _buffer(self, size: int, *, pinned: bool = True) -> Tensor:
        shape = (size, self.sets[0].info.latent_channels, self.crop_frames)
        return torch.empty(shape, dtype=torch.float16, pin_memory=pinned and torch.cuda.is_available())

    def _deal(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which reader has the sample at each position (B,) of one global batch, and at which place of its order."""
        if not self._padded:
            return self._mixture.places(positions)
        step = int(positions[0]) // self.global_batch
        sets, steps = self._mixture.places(np.array([step]))
        bucket, step_of_bucket = self._buckets[int(sets[0])].place(int(steps[0]))
        reader = np.full_like(positions, self._first_reader[int(sets[0])] + bucket)
        return reader, step_of_bucket * self.global_batch + positions - step * self.global_batch

    def _read(
        self,
        positions: NDArray[np.int64],
        readers: NDArray[np.int64],
        places: NDArray[np.int64],
        out: NDArray[np.float16],
        mask: NDArray[np.bool] | None,
    ) -> NDArray[np.int64]:
        """Fill `out`, and `mask` where there is one, with the crops at these positions; returns the samples' ids."""
        crop_keys = keys(self.seed, "crop", torch.from_numpy(positions))
        ids = np.empty_like(positions)
        for number in np.unique(readers).tolist():
            rows = np.flatnonzero(readers == number)
            ids[rows] = self._readers[number].read(places[rows], crop_keys[torch.from_numpy(rows)], out, mask, rows)
        return ids
