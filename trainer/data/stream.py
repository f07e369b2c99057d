"""Batches of random crops: each batch is a pure function of the number of samples seen before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, cycle, islice, repeat
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.conditions import ConditionReader
from trainer.data.crops import Crop, Planned
from trainer.data.fetch_ahead import FetchAhead, Needs
from trainer.data.order import Buckets, Mixture, Order
from trainer.data.reader import Damage, Part, Reader, cut
from trainer.data.reader_pool import ReaderPool, wait_for
from trainer.data.shard_set import ShardSet
from trainer.inputs import Inputs
from trainer.randomness import bits, keys

_PLANNED_AT_ONCE = 4096  # samples
_PLAN_GROWTH = 8  # each plan has so many times the steps of the one before, and costs little more than that one


@dataclass(frozen=True, kw_only=True)
class Batch(Inputs):
    """A micro batch as it is read: a module's inputs, and the ids of the samples in them."""

    ids: Tensor
    """(b,), int64: each sample's index in its set."""
    sets: Tensor
    """(b,), int64: the number of the stream's set that each sample is from."""


@dataclass(frozen=True)
class Shuffle:
    """How samples are shuffled. The fields are those of `Order`; the window is given in samples or in MiB."""

    kind: str = "windowed"
    block: int = 64
    window: int | None = None
    window_mib: float = 2048.0
    lanes: int = 64

    def order(self, shard_set: ShardSet, seed: int, part: Part | None = None) -> Order:
        """Return the order of a set, or of a part of the set."""
        part = part or Part(0)
        window = self.window or max(self.block * self.lanes, int(self.window_mib * 2**20 / shard_set.mean_bytes))
        fingerprint = shard_set.fingerprint + (f":{part.frames}" if part.ids is not None else "")
        return Order(part.samples(shard_set), fingerprint, seed, self.kind, self.block, window, self.lanes)


class LatentStream:
    """The endless stream of the samples of one set, or of several weighted sets, with a new order in every epoch.

    The global batch after n samples consists of positions n … n + global_batch - 1, whatever the number of ranks and
    micro batches, so n is the only state to save. Each rank takes every world_size-th position.

    Samples are cropped to `crop_frames`. `buckets` are shorter lengths, in frames: with them, each batch holds samples
    of one set and one bucket, padded to the bucket's length, and a mask tells real frames from padding. A sample
    belongs to the smallest bucket that it fits in; longer samples are cropped to `crop_frames`.

    `conditions` are read together with the latents, from the sets that hold them.

    A sample that can't be read is replaced by the next sample of its lane, which is the same on every rank. The
    replacement uses the random numbers of the position. Damaged samples are logged to `errors` as lines of JSON.

    Raises:
        ValueError: `crop_frames` exceeds the shortest clip and there are no buckets; the sets' latents were made by
            different autoencoders; or (while reading) more than the fraction `max_damaged` of a set can't be read.
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
            raise ValueError(f"global_batch must be at least 1, not {global_batch}")
        self._padded = bool(buckets)
        self._channels = self.sets[0].info.latent_channels
        self.conditions: list[ConditionReader] = []
        for shard_set in self.sets:
            self._check(shard_set)
        damage = Damage(errors, max_damaged)
        parts = {shard_set: cut(shard_set, lengths if self._padded else [crop_frames]) for shard_set in self.sets}
        self._readers = [
            Reader(shard_set, part, shuffle.order(shard_set, seed, part), damage)
            for shard_set, set_parts in parts.items()
            for part in set_parts
        ]
        self._first_reader = list(accumulate(map(len, parts.values()), initial=0))  # the first reader of each set
        self._mixture = Mixture(tuple(weights.values()), seed, lanes=1 if self._padded else shuffle.lanes)
        self._buckets = [
            Buckets(tuple(part.samples(shard_set) for part in set_parts), global_batch, seed)
            for shard_set, set_parts in parts.items()
        ]

    def _check(self, shard_set: ShardSet) -> None:
        shortest, first = shard_set.shortest_frames, self.sets[0]
        if self.crop_frames < 1 or (self.crop_frames > shortest and not self._padded):
            raise ValueError(
                f"crops of {self.crop_frames} frames don't fit the shortest clip of {shard_set.location}, which has"
                f" {shortest} frames: take crops of 1 to {shortest} frames, prepare longer clips, or give"
                f" data.buckets=[…]"
            )
        if shard_set.info.ae_identity != first.info.ae_identity:
            raise ValueError(
                f"{shard_set.location} and {first.location} hold latents of two autoencoders, which can't be mixed: "
                f"prepare both sets with the same autoencoder"
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
        """Read micro batch `part` of one rank, of the global batch that begins after `samples_seen` samples.

        Args:
            samples_seen: the position in the stream.
            rank: the rank, 0 … world_size - 1.
            world_size: the number of ranks that share the global batch.
            part: the micro batch, 0 … parts - 1.
            parts: micro batches per global batch on each rank.
            out: the buffer for `x0`, float16, contiguous, at least b · C · crop_frames values; None allocates one.

        Raises:
            ValueError: the global batch can't be split into world_size · parts equal micro batches, or too many
                samples are damaged.
        """
        size = self._part_size(samples_seen, world_size, parts)
        positions = samples_seen + rank + world_size * np.arange(part * size, (part + 1) * size)
        if out is None:
            out = self._buffer(size, pinned=False)
        return self._read(self._plan(positions), out)

    def planned(self, samples_seen: int) -> list[tuple[int, int]]:
        """Return (set number, sample id) for each sample of the global batch at a position, without reading them.

        Damaged samples are listed too, not their replacements.
        """
        plan = self._plan(samples_seen + np.arange(self.global_batch))
        return list(zip(plan.sets.tolist(), plan.ids.tolist(), strict=True))

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
        give_up: Callable[[], bool] = lambda: False,
    ) -> Generator[Batch | None]:
        """Yield a rank's micro batches from `samples_seen` on, without end.

        `threads` threads read `ahead` batches in advance; with 0 threads, each batch is read when it is requested.
        If `give_up` returns true while a batch is awaited, the iterator yields None and ends.

        Shards of remote sets are prefetched into at most half of the cache, shared equally by the node's `local_ranks`.

        A batch's `x0` is valid until the next batch is requested; then its buffer (pinned, if there is CUDA) is reused.
        The threads end when the iterator is closed, is garbage collected or raises.
        """
        size, ahead = self._part_size(samples_seen, world_size, parts), ahead if threads else 0
        buffers = [self._buffer(size) for _ in range(ahead + 1)]
        work = zip(self._plans(samples_seen, rank, world_size, size, reads=True), cycle(buffers), strict=False)
        prefetching = self._prefetching(samples_seen, rank, world_size, local_ranks)
        with prefetching as prefetch, ReaderPool(threads or 1, give_up) as pool, self._interrupt_remotes_at_exit():
            prefetch(0)
            pending = deque(pool.submit(self._read, *item) for item in islice(work, ahead))
            for number, item in enumerate(work):
                if threads:
                    pending.append(pool.submit(self._read, *item))
                batch = wait_for(pending.popleft(), give_up) if threads else self._read(*item)
                yield batch
                if batch is None:
                    return
                prefetch(number // parts)

    def blank(self, size: int) -> Batch:
        """Return a micro batch of zeros."""
        x0_BCT, zeros_B = self._buffer(size, pinned=False).zero_(), torch.zeros(size, dtype=torch.int64)
        return Batch(x0=x0_BCT, positions=zeros_B, ids=zeros_B, sets=zeros_B, conditions=self._blank_conditions(size))

    @contextmanager
    def _prefetching(
        self, samples_seen: int, rank: int, world_size: int, local_ranks: int
    ) -> Iterator[Callable[[int], None]]:
        """Prefetch remote shards; yields a function to call with each step's number, counted from `samples_seen`."""
        caches = [shard_set.cache for shard_set in self.sets if shard_set.cache is not None]
        if not caches:
            yield lambda step: None
            return
        settings = caches[0].settings
        needs = self._needs(samples_seen, rank, world_size)
        share = settings.limit // (2 * local_ranks)
        with FetchAhead(needs, share=share, fetchers=settings.fetchers) as fetch_ahead:
            yield fetch_ahead.to
        for cache in caches:
            cache.remote.interrupted.clear()

    @contextmanager
    def _interrupt_remotes_at_exit(self) -> Iterator[None]:
        """Interrupt all fetching when the block ends, so that no thread keeps waiting for an unreachable server."""
        try:
            yield
        finally:
            for shard_set in self.sets:
                if shard_set.cache is not None:
                    shard_set.cache.remote.interrupted.set()

    def _needs(self, samples_seen: int, rank: int, world_size: int) -> Iterator[Needs]:
        """Yield the remote shards that a rank needs for each global batch from `samples_seen` on."""
        for plan in self._plans(samples_seen, rank, world_size, self.global_batch // world_size):
            needs: Needs = {}
            for number in np.unique(plan.readers).tolist():
                shard_set = self._readers[number].shard_set
                if shard_set.cache is not None:
                    shards = shard_set.shards_of(plan.ids[plan.readers == number])
                    needs |= {(shard_set, shard): size for shard, size in shards.items()}
            yield needs

    def _part_size(self, samples_seen: int, world_size: int, parts: int) -> int:
        """Return the samples per micro batch; raises ValueError if the global batch can't be split this way."""
        if self.global_batch % (world_size * parts):
            raise ValueError(
                f"a global batch of {self.global_batch} can't be split into {world_size} ranks × {parts} micro batches:"
                f" set global_batch to a multiple of {world_size * parts}"
            )
        if self._padded and samples_seen % self.global_batch:
            raise ValueError(f"with buckets, batches begin at multiples of {self.global_batch}, not at {samples_seen}")
        return self.global_batch // (world_size * parts)

    def _buffer(self, size: int, *, pinned: bool = True) -> Tensor:
        shape = (size, self._channels, self.crop_frames)
        return torch.empty(shape, dtype=torch.float16, pin_memory=pinned and torch.cuda.is_available())

    def _plans(
        self, samples_seen: int, rank: int, world_size: int, size: int, *, reads: bool = False
    ) -> Iterator[_Plan]:
        """Yield the plans of a rank's micro batches of `size` samples from `samples_seen` on, with `reads` or without.

        Many micro batches are planned at once, which makes the planning of each about ten times as fast.
        """
        per_rank, steps = self.global_batch // world_size, 1
        while True:
            plan = self._plan(samples_seen + rank + world_size * np.arange(steps * per_rank))
            planned_reads = self._plan_reads(plan, size) if reads else repeat({})
            for start, batch_reads in zip(range(0, steps * per_rank, size), planned_reads, strict=False):
                yield plan.rows(start, start + size, batch_reads)
            samples_seen += steps * self.global_batch
            # The number of planned steps grows from one, so that the first batch does not wait for a long plan.
            steps = max(1, min(_PLAN_GROWTH * steps, _PLANNED_AT_ONCE // per_rank))

    def _plan_reads(self, plan: _Plan, size: int) -> list[dict[int, Planned]]:
        """Return how each micro batch of `size` samples is read and cut, by reader.

        Sets whose index is not in memory are left to the threads that read, as they wait for the disk.
        """
        count = len(plan.positions) // size
        of_batches: list[dict[int, Planned]] = [{} for _ in range(count)]
        for number, rows in _groups(plan.readers, len(self._readers)):
            reader = self._readers[number]
            if reader.shard_set.index_in_memory:
                planned = reader.plan(plan.ids[rows], plan.bits[rows], rows // size, count, channels=self._channels)
                for of_batch, of_reader in zip(of_batches, planned, strict=True):
                    of_batch[number] = of_reader
        return of_batches

    def _plan(self, positions: NDArray[np.int64]) -> _Plan:
        """Decide which reader reads which sample for each of the positions (n,)."""
        if self._padded:
            readers, places = self._plan_buckets(positions)
        else:
            readers, places = self._mixture.places(positions)
        ids = np.empty_like(places)
        for number, rows in _groups(readers, len(self._readers)):
            ids[rows] = self._readers[number].ids(places[rows])
        sets = np.searchsorted(self._first_reader, readers, side="right") - 1
        return _Plan(positions, readers, places, ids, sets, self._crop_bits(positions))

    def _crop_bits(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return 64 random bits for the crop of each position (n,), or zeros if no reader has a choice of crops."""
        if all(reader.reads_whole_clips for reader in self._readers):
            return np.zeros_like(positions)
        return bits(keys(self.seed, "crop", torch.from_numpy(positions))).numpy()

    def _plan_buckets(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the reader of each position (n,) and the place in that reader's order (n,), a bucket per batch."""
        steps, inverse = np.unique(positions // self.global_batch, return_inverse=True)
        sets, set_steps = self._mixture.places(steps)
        pairs = zip(sets.tolist(), set_steps.tolist(), strict=True)
        bucket, bucket_step = np.array([self._buckets[number].place(step) for number, step in pairs]).T
        first = np.array(self._first_reader)[sets]
        return (first + bucket)[inverse], ((bucket_step - steps) * self.global_batch)[inverse] + positions

    def _read(self, plan: _Plan, out: Tensor) -> Batch:
        """Read the crops of a micro batch into `out`, and the samples' conditions."""
        frames = self._readers[int(plan.readers[0])].part.frames  # all readers of a batch crop to the same length
        size = len(plan.positions)
        shape = (size, out.shape[1], frames)
        x0 = out if out.shape == shape else out.view(-1)[: math.prod(shape)].view(shape)
        mask = np.ones((size, frames), bool) if self._padded else None
        ids = plan.ids.copy()
        for number, rows in _groups(plan.readers, len(self._readers)):
            crop = Crop(plan.places[rows], ids[rows], plan.bits[rows], rows, plan.reads.get(number))
            ids[rows] = self._readers[number].read(crop, x0.numpy(), mask)
        return Batch(
            x0=x0,
            positions=torch.from_numpy(plan.positions),
            ids=torch.from_numpy(ids),
            sets=torch.from_numpy(plan.sets),
            mask=None if mask is None or mask.all() else torch.from_numpy(mask),
            conditions=self._read_conditions(plan, ids),
        )

    def _read_conditions(self, plan: _Plan, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """Read the conditions of the samples `ids` (n,), which may differ from the planned ones."""
        conditions = self._blank_conditions(len(ids))
        for number, rows in _groups(plan.readers, len(self._readers)) if self.conditions else ():
            reader = self._readers[number]
            note = partial(reader.damage.note, reader.shard_set)
            for condition in self.conditions:
                condition.fill(
                    conditions,
                    reader.shard_set,
                    ids=ids[rows],
                    rows=rows,
                    positions=plan.positions[rows],
                    note=note,
                )
        return conditions

    def _blank_conditions(self, size: int) -> dict[str, Tensor]:
        return {name: value for condition in self.conditions for name, value in condition.blank(size).items()}


@dataclass(frozen=True)
class _Plan:
    """The samples to read for n positions of the stream; each field but `reads` is a column (n,)."""

    positions: NDArray[np.int64]
    readers: NDArray[np.int64]
    places: NDArray[np.int64]
    """Each sample's place in the order of its reader."""
    ids: NDArray[np.int64]
    sets: NDArray[np.int64]
    bits: NDArray[np.int64]
    """Random bits for each position's crop, drawn for a whole plan at once because many cost little more than a few."""
    reads: dict[int, Planned] = field(default_factory=dict)
    """How the samples are read and cut, by reader; a reader without an entry finds out when it reads."""

    def rows(self, start: int, end: int, reads: dict[int, Planned]) -> _Plan:
        """Return the plan of rows start … end - 1, whose reads are given."""
        part = slice(start, end)
        of_stream = (self.positions[part], self.readers[part], self.places[part])
        return _Plan(*of_stream, self.ids[part], self.sets[part], self.bits[part], reads)


def _groups(numbers: NDArray[np.int64], count: int) -> list[tuple[int, NDArray[np.int64]]]:
    """Return each of the numbers, all below `count`, that occurs, with the indices where it does."""
    if count == 1:
        return [(0, np.arange(len(numbers)))]
    return [(number, np.flatnonzero(numbers == number)) for number in np.unique(numbers).tolist()]
