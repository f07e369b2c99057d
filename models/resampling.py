"""Changes the sample rate of sound in blocks, so that sound of any length takes the same memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import soxr
from numpy.typing import NDArray

Audio = NDArray[np.float32]
"""Audio as float32, (channels, samples) or (samples,), with full scale 1."""
_MOST_MADE = 1 << 20  # samples that are resampled at a time
_HELD = 1 << 14
"""Samples that are held back until the end, because the resampler's last block may exceed the wanted length."""


def resampled_samples(samples: int, rate: int, wanted: int) -> int:
    """Return how many samples at `wanted` Hz last as long as `samples` at `rate` Hz, rounded up."""
    return -(-samples * wanted // rate)


def resample(blocks: Iterable[Audio], rate: int, wanted: int, *, channels: int) -> Iterator[Audio]:
    """Resample blocks (channels, any length) from `rate` to `wanted` Hz; the result doesn't depend on the blocks."""
    if rate == wanted:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, wanted, channels, dtype="float32")
    at_once = max(1, _MOST_MADE * rate // wanted)  # a block at a very low rate would become one of hours
    for block in blocks:
        for start in range(0, block.shape[1], at_once):
            yield stream.resample_chunk(np.ascontiguousarray(block[:, start : start + at_once].T)).T
    yield stream.resample_chunk(np.zeros((0, channels), np.float32), last=True).T


def resample_exactly(blocks: Iterable[Audio], rate: int, wanted: int, *, channels: int) -> Iterator[Audio]:
    """Do what `resample` does, and cut or zero-pad the end so that n samples become ⌈n · wanted / rate⌉."""
    given = made = 0

    def counted() -> Iterator[Audio]:
        nonlocal given
        for block in blocks:
            given += block.shape[1]
            yield block

    held = np.zeros((channels, 0), np.float32)
    for part in resample(counted(), rate, wanted, channels=channels):
        held = np.concatenate([held, part], axis=1)
        if held.shape[1] > 2 * _HELD:
            yield held[:, :-_HELD]
            made += held.shape[1] - _HELD
            held = held[:, -_HELD:]
    yield fit(held, resampled_samples(given, rate, wanted) - made)


def fit_blocks(blocks: Iterable[Audio], samples: int, *, channels: int) -> Iterator[Audio]:
    """Cut blocks (channels, any length) that come one after another to `samples` in all, or zero-pad the end."""
    left = samples
    for block in blocks:
        yield block[:, :left]
        left -= min(left, block.shape[1])
    yield np.zeros((channels, left), np.float32)


def fit(audio: Audio, samples: int) -> Audio:
    """Cut audio (channels, any length) to `samples`, or zero-pad it."""
    missing = samples - audio.shape[1]
    return np.pad(audio, ((0, 0), (0, missing))) if missing > 0 else audio[:, :samples]
