"""One level for all sounds: what the codec's models see is levelled, and the gain travels beside the codes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from models.bitstream import GAIN_STEP_DB

LARGEST_GAIN_DB = 60.0
SILENCE = 1e-4  # -80 dB re full scale


def is_silent(audio_CS: Tensor) -> bool:
    """Whether nothing is heard in (channels, samples): less than 80 dB below full scale, apart from a constant."""
    return (
        audio_CS.numel() == 0
        or float((audio_CS - audio_CS.mean(-1, keepdim=True)).square().mean(-1).max()) < SILENCE**2
    )


def level(audio_CS: Tensor, *, target_rms_db: float = -23.0, peak: float = 0.99) -> tuple[Tensor, float]:
    """Bring audio to a common level: the target's RMS, or as near to it as no sample over `peak` allows.

    Args:
        audio_CS: (channels, samples).
        target_rms_db: re full scale 1, over all channels and samples.
        peak: the largest absolute value allowed.

    Returns:
        The audio times 10^(gain/20), and the gain in dB, a multiple of 0.5 within ±60. Silence is left alone, gain 0.
    """
    if is_silent(audio_CS):
        return audio_CS, 0.0
    mean_square = float(audio_CS.double().square().mean())
    gain_db = _gain_db(mean_square, float(audio_CS.abs().max()), target_rms_db, peak)
    return audio_CS * 10 ** (gain_db / 20), gain_db


def gain_of(blocks: Iterable[Tensor], *, target_rms_db: float = -23.0, peak: float = 0.99) -> float | None:
    """The gain in dB by which `level` would multiply the audio that comes in blocks (channels, …); None for silence."""
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
