"""The order in which a stream reads its samples: computed, never stored.

A keyed permutation of 0 … size-1 in O(1) time and memory a sample. It is a Feistel network: a number is split into
(left, right) = divmod(index, side), and round after round one half is shifted, modulo the side, by a hash of the other
half and the round's key. Each round can be undone, so the whole is a permutation of 0 … side²-1, whatever the hash is.
What falls at or above `size` goes through the network again until it lies below ("cycle walking", Black and Rogaway
2002), which keeps it a permutation. With side = ⌈√size⌉ almost nothing has to.

A true shuffle reads one sample here and one there. The windowed one keeps reads together: blocks of consecutive samples
are permuted over the whole set, then samples within a window of many blocks. Its blocks are dealt out to *lanes*:
place i of an epoch belongs to lane i mod L, so that n ranks that take every n-th sample, n a divisor of L, share none.

All arithmetic is on unsigned 64-bit integers: the same order on every machine and with every NumPy.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10  # below 8, an index and its place are measurably correlated
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


SHUFFLES = ("global", "windowed", "none")


@dataclass(frozen=True)
class Order:
    """The endless stream over a set: epoch e is positions e·size … (e+1)·size-1 and holds every sample exactly once.

    Raises ValueError where there is no sample, an unknown shuffle, or a window without room for a block in each lane.
    """

    size: int
    """Samples in the set."""
    fingerprint: str
    """The set's; another set has another order."""
    seed: int
    """The run's."""
    shuffle: str = "global"
    """`global`: a true shuffle. `windowed`: of blocks, then within windows. `none`: as they lie, every epoch."""
    block: int = 64
    """Consecutive samples that stay in one window."""
    window: int = 65_536
    """Samples in all lanes' windows together: what a batch is drawn from."""
    lanes: int = 1
    """Of the windowed shuffle. It does not depend on the number of ranks, or the order would."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 2**62:
            raise ValueError(f"an order is over 1 to 2**62 samples, not {self.size}")
        if self.shuffle not in SHUFFLES:
            raise ValueError(f"samples are shuffled in one of the ways {', '.join(SHUFFLES)}, not {self.shuffle!r}")
        if self.block < 1 or self.lanes < 1 or self.window < self.block * self.lanes:
            raise ValueError(
                f"a window of {self.window} samples has no room for a block of {self.block} in each of {self.lanes} "
                f"lane(s): take at least {max(1, self.block) * max(1, self.lanes)}"
            )

    def ids(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples, 0 … size-1, that stand at these positions (B,), from 0 on."""
        epochs, places = np.divmod(positions, self.size)
        if self.shuffle == "none":
            return places
        if self.shuffle == "global":
            return permute(places, self.size, self._keys("", epochs))
        # Each epoch cuts the set into blocks elsewhere, so that no sample is always among those that fill no round.
        shift = self._keys("shift", epochs) % np.uint64(self.size)
        return (self._windowed(places, epochs) + shift.astype(np.int64)) % self.size

    def _windowed(self, places: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.int64]:
        rounds = self.size // (self.block * self.lanes)  # every lane has so many blocks
        body = rounds * self.lanes * self.block
        # The rest, less than a block a lane, comes last and is shuffled by itself.
        ids = places.copy()
        rest = np.flatnonzero(places >= body)
        ids[rest] = body + permute(places[rest] - body, max(1, self.size - body), self._keys("rest", epochs[rest]))
        inside = np.flatnonzero(places < body)
        if inside.size:
            ids[inside] = self._in_blocks(places[inside], epochs[inside], rounds)
        return ids

    def _in_blocks(self, places: NDArray[np.int64], epochs: NDArray[np.int64], rounds: int) -> NDArray[np.int64]:
        # Within its lane, a place lies in a window, and there goes to another place.
        in_lane, lane = np.divmod(places, self.lanes)
        width = max(1, self.window // (self.block * self.lanes)) * self.block
        window, in_window = np.divmod(in_lane, width)
        keys = _mix(self._keys("window", epochs) ^ _mix((window * self.lanes + lane).astype(np.uint64)))
        last, shorter = divmod(rounds * self.block, width)
        for places_of, length in ((window < last, width), (window == last, shorter)):
            chosen = np.flatnonzero(places_of)
            if chosen.size:
                in_window[chosen] = permute(in_window[chosen], length, keys[chosen])
        # That place is a sample of the lane's blocks, which lie all over the set.
        round_, in_block = np.divmod(window * width + in_window, self.block)
        blocks = permute(round_ * self.lanes + lane, rounds * self.lanes, self._keys("blocks", epochs))
        return blocks * self.block + in_block

    def _keys(self, purpose: str, epochs: NDArray[np.int64]) -> NDArray[np.uint64]:
        """A key for each epoch (B,)."""
        distinct, which = np.unique(epochs, return_inverse=True)
        of_epochs = [_epoch_key(self.fingerprint, self.seed, f"{epoch}{purpose}") for epoch in distinct.tolist()]
        return np.array(of_epochs, np.uint64)[which]


@dataclass(frozen=True)
class Mixture:
    """Several endless streams in one, by weights, exactly: of Σ weights places in a row, or of a lane, that begin
    at a multiple of that sum, each stream has its weight (in a row: within the lanes). One stream is passed through."""

    weights: tuple[int, ...]
    """Whole numbers, one a stream; their ratios count."""
    seed: int
    lanes: int = 1
    """As of the streams' orders: a stream's place lies in the same lane as its place in the whole."""

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) < 1:
            raise ValueError(f"the weights of sets are whole numbers of at least 1, not {list(self.weights)}")

    def places(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which stream stands at these positions (B,), and at which of its own positions (B,)."""
        if len(self.weights) == 1:
            return np.zeros_like(positions), positions
        in_lane, lane = np.divmod(positions, self.lanes)
        weights = np.array(self.weights)
        ends = weights.cumsum()
        # A Latin square: every slot of a cycle once in a lane, and once in as many lanes beside each other.
        cycle, group = in_lane // ends[-1], lane // ends[-1]
        key = np.uint64(_epoch_key("mixture", self.seed, str(self.weights)))
        keys = _mix(key ^ _mix((cycle * self.lanes + group).astype(np.uint64)))
        slot = permute((in_lane + lane) % ends[-1], int(ends[-1]), keys)
        stream = np.searchsorted(ends, slot, side="right")
        of_stream = cycle * weights[stream] + slot - (ends - weights)[stream]
        return stream, of_stream * self.lanes + lane


@dataclass(frozen=True)
class Buckets:
    """Batches of whole buckets: every batch is of one, each gets as many as its samples fill, in a keyed order.

    After e epochs, bucket b has had exactly ⌊e · sizes[b] / batch⌋ batches: what does not fill one more is carried over
    into the next epoch.
    """

    sizes: tuple[int, ...]
    """Samples in each bucket."""
    batch: int
    """Samples to a batch."""
    seed: int

    def place(self, number: int) -> tuple[int, int]:
        """Of which bucket a batch is, and which of that bucket's it is; both from 0 on."""
        epoch = number * self.batch // sum(self.sizes)  # or the one after it, as buckets are rounded down
        while sum(self._batches_before(epoch + 1)) <= number:
            epoch += 1
        before, after = self._batches_before(epoch), self._batches_before(epoch + 1)
        ends = list(accumulate(later - earlier for earlier, later in zip(before, after, strict=True)))
        key = _epoch_key("buckets", self.seed, f"{epoch} {self.sizes}")
        slot = int(permute(np.array([number - sum(before)]), ends[-1], key)[0])
        bucket = bisect_right(ends, slot)
        return bucket, before[bucket] + slot - (ends[bucket - 1] if bucket else 0)

    def _batches_before(self, epoch: int) -> list[int]:
        return [epoch * size // self.batch for size in self.sizes]


def permute(index: NDArray[np.int64], size: int, key: int | NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each index goes under the key's permutation of 0 … size-1.

    Args:
        index: (B,), each in 0 … size-1.
        size: 1 … 2⁶².
        key: 64 bits: one for all, or one for each index (B,).

    Returns:
        (B,), each in 0 … size-1. Equal keys: no two indices go to the same place.
    """
    if not 1 <= size <= 2**62:
        raise ValueError(f"an order is over 1 to 2**62 samples, not {size}")
    if len(index) and not (index.min() >= 0 and index.max() < size):
        raise ValueError(f"an index of an order over {size} samples is 0 to {size - 1}")
    side = int(np.ceil(np.sqrt(size)))
    side += side * side < size  # where the square root was rounded down
    keys = np.broadcast_to(np.asarray(key, np.uint64), index.shape)
    place = _network(index.astype(np.uint64), side, keys)
    while (outside := np.flatnonzero(place >= size)).size:
        place[outside] = _network(place[outside], side, keys[outside])
    return place.astype(np.int64)


def _network(index: NDArray[np.uint64], side: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    modulus, half_word = np.uint64(side), np.uint64(32)
    left, right = np.divmod(index, modulus)
    for round_ in range(1, _ROUNDS + 1):
        mixed = _mix(right ^ _mix(keys + np.uint64(round_ * _GOLDEN & _MASK)))
        # The upper 32 bits, scaled to 0 … side-1: as good as the remainder, without a division.
        shifted = left + ((mixed >> half_word) * modulus >> half_word)
        left, right = right, np.where(shifted >= modulus, shifted - modulus, shifted)
    return left * modulus + right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al. 2014): every bit of the input sways every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _epoch_key(fingerprint: str, seed: int, epoch: str) -> int:
    digest = hashlib.blake2b(f"{fingerprint}:{seed}:{epoch}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
