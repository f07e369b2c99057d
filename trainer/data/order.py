"""The order in which a stream reads its samples: computed, never stored.

A keyed permutation of 0 … size-1 in O(1) time and memory a sample. It is a Feistel network: a number is split into
(left, right) = divmod(index, side), and round after round one half is shifted, modulo the side, by a hash of the other
half and the round's key. Each round can be undone, so the whole is a permutation of 0 … side²-1, whatever the hash is.
What falls at or above `size` goes through the network again until it lies below ("cycle walking", Black and Rogaway
2002), which keeps it a permutation. With side = ⌈√size⌉ almost nothing has to.

All arithmetic is on unsigned 64-bit integers: the same order on every machine and with every NumPy.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10  # below 8, an index and its place are measurably correlated
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def sample_ids(
    positions: NDArray[np.int64], size: int, *, fingerprint: str, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The samples that stand at these positions of the endless stream over a set.

    Epoch e is positions e·size … (e+1)·size-1, and every sample stands in it exactly once.

    Args:
        positions: (B,), from 0 on.
        size: samples in the set.
        fingerprint: the set's; another set has another order.
        seed: the run's.

    Returns:
        ids (B,) in 0 … size-1, and the epochs (B,).
    """
    epochs, places = np.divmod(positions, size)
    distinct, which = np.unique(epochs, return_inverse=True)
    keys = np.array([_epoch_key(fingerprint, seed, int(epoch)) for epoch in distinct], np.uint64)
    return permute(places, size, keys[which]), epochs


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


def _epoch_key(fingerprint: str, seed: int, epoch: int) -> int:
    digest = hashlib.blake2b(f"{fingerprint}:{seed}:{epoch}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
