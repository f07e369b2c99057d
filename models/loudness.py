"""Bring all sounds to one level: the codec's models see levelled audio, and the gain is stored with the codes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.bitstream import GAIN_STEP_DB

LARGEST_GAIN_DB = 60.0
LARGEST_VALUE = 100.0
"""40 dB above full scale. Larger values are those of whole numbers that were stored as floats undivided."""
SILENCE = 1e-4  # -80 dB re full scale


def is_silent(audio_CS: Tensor) -> bool:
    """Whether every channel of (channels, samples) is below -80 dB re full scale after its mean is removed."""
    return (
        audio_CS.numel() == 0
        or float((audio_CS - audio_CS.mean(-1, keepdim=True)).square().mean(-1).max()) < SILENCE**2
    )


class SilenceMeter:
    """Finds out whether sound in blocks (channels, …) is silent, by the rule of `is_silent`.

    Attributes:
        samples: the number of samples so far.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._sums_C2: NDArray[np.float64] | float = 0.0

    def through(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Yield the blocks, and measure each of them."""
        for block_CS in blocks:
            exact_CS = block_CS.astype(np.float64)
            self.samples += exact_CS.shape[1]
            self._sums_C2 = self._sums_C2 + np.stack([exact_CS.sum(1), np.square(exact_CS).sum(1)], axis=1)
            yield block_CS

    @property
    def silent(self) -> bool:
        """Whether every channel of all blocks so far is below -80 dB re full scale without its mean."""
        if not self.samples:
            return True
        means_C2 = np.atleast_2d(self._sums_C2) / self.samples
        return bool((means_C2[:, 1] - means_C2[:, 0] ** 2).max() < SILENCE**2)


def level(audio_CS: Tensor, *, target_rms_db: float = -23.0, peak: float = 0.99) -> tuple[Tensor, float]:
    """Scale audio to the target RMS, or to less if a sample would otherwise exceed `peak`.

    Args:
        audio_CS: (channels, samples).
        target_rms_db: RMS over all channels and samples in dB re full scale 1.
        peak: the largest absolute value allowed.

    Returns:
        The audio times 10^(gain/20), and the gain in dB, a multiple of 0.5 within ±60. Silence is unchanged; its gain
        is 0.
    """
    if is_silent(audio_CS):
        return audio_CS, 0.0
    mean_square = float(audio_CS.double().square().mean())
    gain_db = _gain_db(mean_square, float(audio_CS.abs().max()), target_rms_db, peak)
    return audio_CS * 10 ** (gain_db / 20), gain_db


class GainMeter:
    """Finds the gain that `level` would apply to audio that comes in blocks."""

    def __init__(self) -> None:
        self._count, self._total, self._squares = 0, 0.0, 0.0
        self.largest = 0.0
        """The largest absolute value."""

    def add(self, block_CS: Tensor) -> None:
        """Measure a block (channels, …)."""
        exact = block_CS.double()
        self._count += exact.numel()
        self._total += float(exact.sum())
        self._squares += float(exact.square().sum())
        self.largest = max(self.largest, float(block_CS.abs().max()))

    @property
    def power(self) -> float:
        """The mean square without the mean."""
        return self._squares / self._count - (self._total / self._count) ** 2 if self._count else 0.0

    def gain_db(self, *, target_rms_db: float = -23.0, peak: float = 0.99) -> float | None:
        """Return the gain in dB; None for silence."""
        if self.power < SILENCE**2:
            return None
        return _gain_db(self._squares / self._count, self.largest, target_rms_db, peak)


def _gain_db(mean_square: float, largest: float, target_rms_db: float, peak: float) -> float:
    headroom = math.floor(20 * math.log10(peak / largest) / GAIN_STEP_DB)
    steps = min(round((target_rms_db - 10 * math.log10(mean_square)) / GAIN_STEP_DB), headroom)
    return min(max(steps * GAIN_STEP_DB, -LARGEST_GAIN_DB), LARGEST_GAIN_DB)
