"""Bring all sounds to one level: the codec's models see levelled audio, and the gain is stored with the codes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from models.bitstream import GAIN_STEP_DB

LARGEST_GAIN_DB = 60.0
SILENCE = 1e-4  # -80 dB re full scale


def is_silent(audio_CS: Tensor) -> bool:
    """Whether every channel of (channels, samples) is below -80 dB re full scale after its mean is removed."""
    return (
        audio_CS.numel() == 0
        or float((audio_CS - audio_CS.mean(-1, keepdim=True)).square().mean(-1).max()) < SILENCE**2
    )


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


def gain_of(blocks: Iterable[Tensor], *, target_rms_db: float = -23.0, peak: float = 0.99) -> float | None:
    """Return the gain in dB that `level` would apply to audio in blocks (channels, …); None for silence."""
    count, total, squares, largest = 0, 0.0, 0.0, 0.0
    for block_CS in blocks:
        exact = block_CS.double()
        count, total, squares = count + exact.numel(), total + float(exact.sum()), squares + float(exact.square().sum())
        largest = max(largest, float(block_CS.abs().max()))
    if not count or squares / count - (total / count) ** 2 < SILENCE**2:
        return None
    return _gain_db(squares / count, largest, target_rms_db, peak)


def _gain_db(mean_square: float, largest: float, target_rms_db: float, peak: float) -> float:
    headroom = math.floor(20 * math.log10(peak / largest) / GAIN_STEP_DB)
    steps = min(round((target_rms_db - 10 * math.log10(mean_square)) / GAIN_STEP_DB), headroom)
    return min(max(steps * GAIN_STEP_DB, -LARGEST_GAIN_DB), LARGEST_GAIN_DB)
