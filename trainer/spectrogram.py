"""Draws a clip's spectrogram, for TensorBoard and for the listening page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from trainer.evaluate.figures import mel_energies

PICTURE_FLOOR_DB = 70.0
"""Energies more than this many dB below the clip's maximum are drawn as silence."""

_LEVELS = 64  # of about 1 dB each: they look continuous, and few colours make small files
# From near-black through violet and orange to cream, in even steps of lightness (OKLab): the eye reads it as loudness.
_ANCHORS = ("0c0b1c", "2b144f", "541b79", "94167f", "ca3267", "ee5e53", "ff9047", "ffc76f", "fff6c8")


def _colour_table() -> NDArray[np.uint8]:
    anchors = np.array([list(bytes.fromhex(anchor)) for anchor in _ANCHORS])
    positions = np.linspace(0, len(anchors) - 1, _LEVELS)
    channels = [np.interp(positions, np.arange(len(anchors)), channel) for channel in anchors.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


COLOURS = _colour_table()
"""Colours from quiet to loud, RGB: `(levels, 3)`."""


def log_mel_image(audio: Tensor, sample_rate: int, *, height: int, width: int | None = None) -> NDArray[np.uint8]:
    """Draw a log-mel spectrogram in colour, with low frequencies at the bottom.

    Args:
        audio: `(..., samples)`; the channels are averaged.
        sample_rate: in Hz.
        height: pixels.
        width: pixels; None: one per 10 ms.

    Returns:
        RGB `(height, width, 3)`.
    """
    audio = audio.detach().float().cpu().nan_to_num()  # A diverged model's audio must not stop the run.
    mono = audio.reshape(-1, audio.shape[-1]).mean(0)
    energies = mel_energies(mono, sample_rate, n_fft=2048, hop=max(1, sample_rate // 200), bands=128)
    loudest = energies.max().clamp(min=1e-8)  # The minimum keeps silence and rounding noise dark.
    decibels = 10 * (energies / loudest).clamp(min=10 ** (-PICTURE_FLOOR_DB / 10)).log10()
    size = (height, width or max(1, round(100 * mono.shape[-1] / sample_rate)))
    picture = F.interpolate(decibels[None, None], size=size, mode="bilinear", antialias=True)[0, 0].flip(0)
    levels = ((picture / PICTURE_FLOOR_DB + 1) * (_LEVELS - 1)).round().clamp(0, _LEVELS - 1).to(torch.int64)
    return COLOURS[levels.numpy()]


def save_png(image: NDArray[np.uint8], path: Path) -> None:
    """Write a picture of `log_mel_image` as PNG with a palette of its few colours, which keeps the file small."""
    Image.fromarray(image).quantize(_LEVELS).save(path, format="PNG", optimize=True)
