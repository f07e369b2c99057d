"""The order in which a stream reads its samples: computed, never stored.

The order is a keyed permutation of 0 … size-1 that takes O(1) time and memory per sample. The permutation is a Feistel
network: an index is split into (left, right) = divmod(index, side), and in each round one half is shifted, modulo the
side, by a hash of the other half and the round's key. Every round can be inverted, so the network is a permutation of
0 … side²-1, whatever the hash is. An output of `size` or more goes through the network again until it is below `size`
("cycle walking", Black and Rogaway 2002), which keeps the map a permutation. With side = ⌈√size⌉ this is rarely needed.

A global shuffle reads samples from all over the disk. The windowed shuffle keeps reads close together: it permutes
blocks of consecutive samples over the whole set, and then samples within a window of many blocks. The blocks are
distributed over *lanes*: place i of an epoch belongs to lane i mod L. If n ranks each take every n-th sample, and n
divides L, then no two ranks read from the same block.

All arithmetic uses unsigned 64-bit integers, so the order is the same on every machine and with every NumPy version.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10  # with fewer than 8 rounds, an index and its place are measurably correlated
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_ROUND_STEPS = np.array([round_ * _GOLDEN & _MASK for round_ in range(1, _ROUNDS + 1)], np.uint64)
_HALF_WORD = np.uint64(32)
_MIX_STEPS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_MIX_LAST_SHIFT = np.uint64(31)

SHUFFLES = ("global", "windowed", "none")


@dataclass(frozen=True)
class Order:
    """The endless stream over a set: epoch e is positions e·size … (e+1)·size-1 and holds every sample exactly once.

    Raises:
        ValueError: the set has no samples, the shuffle is unknown, or the window has no room for a block in each lane.
    """

    size: int
    """The number of samples in the set."""
    fingerprint: str
    """The set's fingerprint; each set has its own order."""
    seed: int
    """The run's seed."""
    shuffle: str = "global"
    """`global` permutes all samples. `windowed` permutes blocks, then samples within windows. `none` keeps the samples
    in the set's order in every epoch."""
    block: int = 64
    """The number of consecutive samples that stay in one window."""
    window: int = 65_536
    """The number of samples in the windows of all lanes together, from which a batch is drawn."""
    lanes: int = 1
    """Lanes of the windowed shuffle. It must not depend on the number of ranks, or the order would depend on it too."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 2**62:
            raise ValueError(f"an order needs 1 to 2**62 samples, not {self.size}")
        if self.shuffle not in SHUFFLES:
            raise ValueError(f"data.shuffle must be one of {', '.join(SHUFFLES)}, not {self.shuffle!r}")
        if self.block < 1 or self.lanes < 1 or self.window < self.block * self.lanes:
            raise ValueError(
                f"a window of {self.window} samples has no room for a block of {self.block} in each of {self.lanes} "
                f"lane(s): set data.window to at least {max(1, self.block) * max(1, self.lanes)}"
            )

    def ids(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the samples (B,), each in 0 … size-1, at these positions (B,), each at least 0."""
        epochs, places = np.divmod(positions, self.size)
        if self.shuffle == "none":
            return places
        if self.shuffle == "global":
            return permute(places, self.size, self._keys("", epochs))
        # Each epoch places the block boundaries differently, so that the samples left over after the last full round
        # of blocks are not the same in every epoch.
        shift = self._keys("shift", epochs) % np.uint64(self.size)
        return (self._windowed(places, epochs) + shift.astype(np.int64)) % self.size

    def _windowed(self, places: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.int64]:
        rounds = self.size // (self.block * self.lanes)  # the number of blocks in every lane
        body = rounds * self.lanes * self.block
        # The samples left over, less than a block per lane, come last and are shuffled among themselves.
        ids = places.copy()
        tail = np.flatnonzero(places >= body)
        ids[tail] = body + permute(places[tail] - body, max(1, self.size - body), self._keys("rest", epochs[tail]))
        inside = np.flatnonzero(places < body)
        if inside.size:
            ids[inside] = self._in_blocks(places[inside], epochs[inside], rounds)
        return ids

    def _in_blocks(self, places: NDArray[np.int64], epochs: NDArray[np.int64], rounds: int) -> NDArray[np.int64]:
        """The samples at places that belong to full rounds of blocks."""
        # Permute the places within each lane's window.
        in_lane, lane = np.divmod(places, self.lanes)
        width = max(1, self.window // (self.block * self.lanes)) * self.block
        window, in_window = np.divmod(in_lane, width)
        keys = _sub_keys(self._keys("window", epochs), window * self.lanes + lane)
        last, shorter = divmod(rounds * self.block, width)
        for selected, length in ((window < last, width), (window == last, shorter)):
            chosen = np.flatnonzero(selected)
            if chosen.size:
                in_window[chosen] = permute(in_window[chosen], length, keys[chosen])
        # Map each permuted place to a sample of one of the lane's blocks, which are spread over the whole set.
        round_, in_block = np.divmod(window * width + in_window, self.block)
        blocks = permute(round_ * self.lanes + lane, rounds * self.lanes, self._keys("blocks", epochs))
        return blocks * self.block + in_block

    def _keys(self, purpose: str, epochs: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return a key (B,) for each of the epochs (B,), or one key (1,) if all epochs are the same."""
        if epochs.size and (epochs == epochs[0]).all():
            return np.array([_epoch_key(self.fingerprint, self.seed, f"{epochs[0]}{purpose}")], np.uint64)
        distinct, inverse = np.unique(epochs, return_inverse=True)
        epoch_keys = [_epoch_key(self.fingerprint, self.seed, f"{epoch}{purpose}") for epoch in distinct.tolist()]
        return np.array(epoch_keys, np.uint64)[inverse]


@dataclass(frozen=True)
class Mixture:
    """Interleaves several endless streams in exact proportion to their weights.

    Let W = Σ weights. Among any W places of one lane that begin at a multiple of W, each stream holds exactly as many
    places as its weight. The same is true of W neighbouring lanes at one place, if the first lane is a multiple of W.
    A single stream keeps its positions.
    """

    weights: tuple[int, ...]
    """One whole number per stream; only their ratios matter."""
    seed: int
    lanes: int = 1
    """The lanes of the streams' orders: a sample is in the same lane of the mixture and of its own stream."""

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) < 1:
            raise ValueError(f"the weights in data.mix must be whole numbers of at least 1, not {list(self.weights)}")

    def places(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, for each position (B,), the stream that it belongs to (B,) and the position in that stream (B,)."""
        if len(self.weights) == 1:
            return np.zeros_like(positions), positions
        in_lane, lane = np.divmod(positions, self.lanes)
        weights = np.array(self.weights)
        ends = weights.cumsum()
        # A Latin square: every slot of a cycle occurs once in each lane, and once across as many neighbouring lanes.
        cycle, group = in_lane // ends[-1], lane // ends[-1]
        key = np.uint64(_epoch_key("mixture", self.seed, str(self.weights)))
        keys = _sub_keys(key, cycle * self.lanes + group)
        slot = permute((in_lane + lane) % ends[-1], int(ends[-1]), keys)
        stream = np.searchsorted(ends, slot, side="right")
        in_stream = cycle * weights[stream] + slot - (ends - weights)[stream]
        return stream, in_stream * self.lanes + lane


@dataclass(frozen=True)
class Buckets:
    """Assigns every batch to one bucket, in a keyed order; a bucket gets as many batches as its samples fill.

    After e epochs, bucket b has had exactly ⌊e · sizes[b] / batch⌋ batches: samples that do not fill a batch are
    carried over into the next epoch.
    """

    sizes: tuple[int, ...]
    """The number of samples in each bucket."""
    batch: int
    """The number of samples in a batch."""
    seed: int

    def place(self, number: int) -> tuple[int, int]:
        """Return the bucket of batch `number` and the batch's number within that bucket; all count from 0."""
        epoch = number * self.batch // sum(self.sizes)  # a lower bound, because each bucket's batches are rounded down
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
    """Return the place of each index under the key's permutation of 0 … size-1.

    Args:
        index: (B,), each in 0 … size-1.
        size: 1 … 2⁶².
        key: 64 bits: one for all indices, as a number or (1,), or one for each index (B,).

    Returns:
        (B,), each in 0 … size-1. Two different indices with the same key have different places.
    """
    if not 1 <= size <= 2**62:
        raise ValueError(f"an order needs 1 to 2**62 samples, not {size}")
    if len(index) and not (index.min() >= 0 and index.max() < size):
        raise ValueError(f"an index into an order of {size} samples must be 0 to {size - 1}")
    side = int(np.ceil(np.sqrt(size)))
    side += side * side < size  # correct a square root that was rounded down
    keys = _round_keys(np.atleast_1d(np.asarray(key, np.uint64)))
    place = _network(index.astype(np.uint64), side, keys)
    while (outside := np.flatnonzero(place >= size)).size:
        place[outside] = _network(place[outside], side, keys if keys.shape[1] == 1 else keys[:, outside])
    return place.astype(np.int64)


def _round_keys(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the keys of the rounds, (rounds, B), of the networks with these keys (B,)."""
    mixed = keys + _ROUND_STEPS[:, None]
    return _mix(mixed, np.empty_like(mixed))


def _network(index: NDArray[np.uint64], side: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Pass each index (B,) through a network with round keys (rounds, B), or (rounds, 1) if all have the same key.

    All rounds work in the same four arrays, because new ones would take as much time as the arithmetic.
    """
    modulus = np.uint64(side)
    left, right = np.divmod(index, modulus)
    shifted, scratch = np.empty_like(left), np.empty_like(left)
    for keys in round_keys:
        _mix(np.bitwise_xor(right, keys, out=shifted), scratch)
        # Scale the upper 32 bits to 0 … side-1: this is as uniform as the remainder and needs no division.
        shifted >>= _HALF_WORD
        shifted *= modulus
        shifted >>= _HALF_WORD
        # Add modulo the side: the difference of a sum below the side wraps around to a huge number.
        shifted += left
        np.minimum(shifted, np.subtract(shifted, modulus, out=scratch), out=shifted)
        left, right, shifted = right, shifted, left
    left *= modulus
    left += right
    return left


def _mix(x: NDArray[np.uint64], scratch: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of SplitMix64 (Steele et al. 2014) in place: every input bit affects every output bit."""
    for shift, factor in _MIX_STEPS:
        x ^= np.right_shift(x, shift, out=scratch)
        x *= factor
    x ^= np.right_shift(x, _MIX_LAST_SHIFT, out=scratch)
    return x


def _sub_keys(key: np.uint64 | NDArray[np.uint64], numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a key (B,) for each of the numbers (B,), derived from one key or from a key for each number."""
    mixed = numbers.astype(np.uint64)
    scratch = np.empty_like(mixed)
    _mix(mixed, scratch)
    mixed ^= key
    return _mix(mixed, scratch)


def _epoch_key(fingerprint: str, seed: int, epoch: str) -> int:
    digest = hashlib.blake2b(f"{fingerprint}:{seed}:{epoch}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
