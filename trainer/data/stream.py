"""Batches of random crops: each a pure function of how many samples were seen before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, cycle, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.conditions import ConditionReader
from trainer.data.fetch_ahead import FetchAhead, Needs
from trainer.data.order import Buckets, Mixture, Order
from trainer.data.reader import Crop, Damage, Part, Reader, cut
from trainer.data.shard_set import ShardSet
from trainer.inputs import Inputs
from trainer.randomness import bits, keys

_DEALT = 4096  # samples whose places are computed at once
_LOOK_UP = 0.25  # seconds between two looks whether to wait on for a batch


@dataclass(frozen=True, kw_only=True)
class Batch(Inputs):
    """A micro batch as it is read: what a module takes, and which samples it holds."""

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

    `conditions` are read beside the latents, from those of the sets that hold them.

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
        self.conditions: list[ConditionReader] = []
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
        size = self._part_size(samples_seen, world_size, parts)
        positions = samples_seen + rank + world_size * np.arange(part * size, (part + 1) * size)
        if out is None:
            out = self._buffer(size, pinned=False)
        return self._read(self._deal(positions), out)

    def dealt(self, samples_seen: int) -> list[tuple[int, int]]:
        """Number of the set, and id in it, of each sample of the global batch there, as planned; reads none of them."""
        deal = self._deal(samples_seen + np.arange(self.global_batch))
        return list(zip(self._set_of(deal).tolist(), deal.ids.tolist(), strict=True))

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
        """All of a rank's micro-batches from there on, without end, read ahead by threads (0: none, and not ahead).

        One that has not come when `give_up` says so is waited for no longer: None is given, and nothing after it.

        Remote shards are fetched ahead too, as far as the half of the cache reaches that is for what comes, shared
        among the node's `local_ranks`.

        A batch's `x0` holds until the next batch is asked for: then its memory (pinned, where there is CUDA) is used
        again. The threads end when the iterator is closed, dropped or raises.
        """
        size, ahead = self._part_size(samples_seen, world_size, parts), ahead if threads else 0
        buffers = [self._buffer(size) for _ in range(ahead + 1)]
        work = zip(self._deals(samples_seen, rank, world_size, size), cycle(buffers), strict=False)
        fetching = self._fetch_ahead(samples_seen, rank, world_size, local_ranks)
        with fetching as fetch, _Readers(threads or 1, give_up) as pool, self._interrupted_at_the_end():
            fetch(0)
            under_way = deque(pool.submit(self._read, *item) for item in islice(work, ahead))
            for number, item in enumerate(work):
                if threads:
                    under_way.append(pool.submit(self._read, *item))
                batch = _awaited(under_way.popleft(), give_up) if threads else self._read(*item)
                yield batch
                if batch is None:
                    return
                fetch(number // parts)

    def blank(self, size: int) -> Batch:
        """A micro-batch in which there is nothing."""
        x0_BCT, zeros_B = self._buffer(size, pinned=False).zero_(), torch.zeros(size, dtype=torch.int64)
        return Batch(x0=x0_BCT, positions=zeros_B, ids=zeros_B, sets=zeros_B, conditions=self._blank_conditions(size))

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
        for deal in self._deals(samples_seen, rank, world_size, self.global_batch // world_size):
            needs: Needs = {}
            for number in np.unique(deal.readers).tolist():
                shard_set = self._readers[number].shard_set
                if shard_set.cache is not None:
                    shards = shard_set.shards_of(deal.ids[deal.readers == number])
                    needs |= {(shard_set, shard): size for shard, size in shards.items()}
            yield needs

    def _part_size(self, samples_seen: int, world_size: int, parts: int) -> int:
        """Samples to a micro-batch; raises ValueError where there is no such part."""
        if self.global_batch % (world_size * parts):
            raise ValueError(
                f"a global batch of {self.global_batch} can't be cut into {world_size} ranks × {parts} parts:"
                f" make it a multiple of {world_size * parts}"
            )
        if self._padded and samples_seen % self.global_batch:
            raise ValueError(f"with buckets, batches begin at multiples of {self.global_batch}, not at {samples_seen}")
        return self.global_batch // (world_size * parts)

    def _buffer(self, size: int, *, pinned: bool = True) -> Tensor:
        shape = (size, self.sets[0].info.latent_channels, self.crop_frames)
        return torch.empty(shape, dtype=torch.float16, pin_memory=pinned and torch.cuda.is_available())

    def _deals(self, samples_seen: int, rank: int, world_size: int, size: int) -> Iterator[_Deal]:
        """A rank's micro-batches of `size` from there on; many are dealt at once, which costs a tenth for each."""
        each, steps = self.global_batch // world_size, 1
        while True:
            deal = self._deal(samples_seen + rank + world_size * np.arange(steps * each))
            for start in range(0, steps * each, size):
                yield deal.cut(start, start + size)
            samples_seen += steps * self.global_batch
            steps = max(1, min(2 * steps, _DEALT // each))  # the first batch does not wait for many

    def _deal(self, positions: NDArray[np.int64]) -> _Deal:
        """Who reads what for these positions (n,)."""
        if self._padded:
            readers, places = self._deal_buckets(positions)
        else:
            readers, places = self._mixture.places(positions)
        ids = np.empty_like(places)
        for number, rows in _groups(readers, len(self._readers)):
            ids[rows] = self._readers[number].ids(places[rows])
        crop_keys = keys(self.seed, "crop", torch.from_numpy(positions))
        return _Deal(positions, readers, places, ids, bits(crop_keys).numpy())

    def _deal_buckets(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        steps, which = np.unique(positions // self.global_batch, return_inverse=True)
        sets, steps_of_set = self._mixture.places(steps)
        dealt = [self._buckets[of].place(step) for of, step in zip(sets.tolist(), steps_of_set.tolist(), strict=True)]
        bucket, step_of_bucket = np.array(dealt).T
        first = np.array(self._first_reader)[sets]
        return (first + bucket)[which], ((step_of_bucket - steps) * self.global_batch)[which] + positions

    def _read(self, deal: _Deal, out: Tensor) -> Batch:
        """The crops of a micro-batch, in `out`."""
        frames = self._readers[int(deal.readers[0])].part.frames  # the same for all
        size = len(deal.positions)
        x0 = out.view(-1)[: size * out.shape[1] * frames].view(size, -1, frames)
        mask = np.ones((size, frames), bool) if self._padded else None
        ids = deal.ids.copy()
        for number, rows in _groups(deal.readers, len(self._readers)):
            crop = Crop(deal.places[rows], ids[rows], deal.bits[rows], rows)
            ids[rows] = self._readers[number].read(crop, x0.numpy(), mask)
        return Batch(
            x0=x0,
            positions=torch.from_numpy(deal.positions),
            ids=torch.from_numpy(ids),
            sets=torch.from_numpy(self._set_of(deal)),
            mask=None if mask is None or mask.all() else torch.from_numpy(mask),
            conditions=self._read_conditions(deal, ids),
        )

    def _read_conditions(self, deal: _Deal, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """All conditions of the samples that were read for a micro batch."""
        conditions = self._blank_conditions(len(ids))
        for number, rows in _groups(deal.readers, len(self._readers)) if self.conditions else ():
            reader = self._readers[number]
            note = partial(reader.damage.note, reader.shard_set)
            for condition in self.conditions:
                condition.fill(
                    conditions,
                    reader.shard_set,
                    ids=ids[rows],
                    rows=rows,
                    positions=deal.positions[rows],
                    note=note,
                )
        return conditions

    def _blank_conditions(self, size: int) -> dict[str, Tensor]:
        return {name: value for condition in self.conditions for name, value in condition.blank(size).items()}

    def _set_of(self, deal: _Deal) -> NDArray[np.int64]:
        return np.searchsorted(self._first_reader, deal.readers, side="right") - 1


@dataclass(frozen=True)
class _Deal:
    """Which samples stand at which positions: columns of n."""

    positions: NDArray[np.int64]
    readers: NDArray[np.int64]
    places: NDArray[np.int64]
    """In their reader's order."""
    ids: NDArray[np.int64]
    bits: NDArray[np.int64]
    """Random, of each position, for its crop: drawn here, as many at once cost little more than a few."""

    def cut(self, start: int, end: int) -> _Deal:
        """Some rows."""
        columns = (self.positions, self.readers, self.places, self.ids, self.bits)
        return _Deal(*(column[start:end] for column in columns))


def _groups(numbers: NDArray[np.int64], count: int) -> list[tuple[int, NDArray[np.int64]]]:
    """Each number below `count` that occurs, and where."""
    if count == 1:
        return [(0, np.arange(len(numbers)))]
    return [(number, np.flatnonzero(numbers == number)) for number in np.unique(numbers).tolist()]


class _Readers(ThreadPoolExecutor):
    """Ends with its `with`, and waits for its threads, which may hang, unless that is given up."""

    def __init__(self, threads: int, give_up: Callable[[], bool]) -> None:
        super().__init__(threads, "latents")
        self.give_up = give_up

    def __exit__(self, *error: object) -> None:
        self.shutdown(wait=not self.give_up(), cancel_futures=True)


def _awaited(batch: Future[Batch], give_up: Callable[[], bool]) -> Batch | None:
    """What was read, None where that is given up."""
    while True:
        try:
            return batch.result(timeout=_LOOK_UP)
        except TimeoutError:
            if batch.done():
                return batch.result()  # the reader's own time-out
            if give_up():
                return None
