"""Figures of how well a decode keeps the stereo image: levels between the channels, and how alike they are, per band.

Shape suffixes: C = 2 channels, S samples, T frames, F frequency bins, N bands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.evaluate.figures import FLOOR_DB, mel_filterbank

_N_FFT, _HOP, _BANDS = 2048, 512, 24
_FRAMES = 8
"""STFT frames over which a band's energies and their product are averaged: 85 ms at 48 kHz."""
LOUDEST_DIFFERENCE_DB = 30.0
"""Level differences between the channels are clamped to ± this limit, beyond which a sound is heard on one side."""


def stereo_errors(reference_CS: Tensor, estimate_CS: Tensor, sample_rate: int) -> dict[str, float]:
    """Return the errors of a decode's stereo image, averaged over tiles of 24 mel bands and 8 frames.

    A tile counts with its energy in the reference raised to 0.3, about as loud as it is heard, and not at all if it is
    60 dB below the loudest. `level` is the error in dB of the level of left over right; `coherence` that of the real
    part of the channels' normalised correlation, which is from -1 to 1.

    Raises:
        ValueError: the audio is not of two channels, or the shapes differ.
    """
    if reference_CS.shape != estimate_CS.shape or len(reference_CS) != 2:
        raise ValueError(
            f"reference {tuple(reference_CS.shape)} and estimate {tuple(estimate_CS.shape)} must both be (2, samples)"
        )
    energy, level_db, coherence = _image(reference_CS, sample_rate)
    _, found_db, found_coherence = _image(estimate_CS, sample_rate)
    weight = torch.where(energy > energy.max() * 10 ** (-FLOOR_DB / 10), energy**0.3, 0.0)
    weight = weight / weight.sum()
    return {
        "level": float((weight * (found_db - level_db).abs()).sum()),
        "coherence": float((weight * (found_coherence - coherence).abs()).sum()),
    }


def _image(audio_CS: Tensor, sample_rate: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return energy, level difference in dB and coherence of each tile."""
    window = torch.hann_window(_N_FFT, device=audio_CS.device)
    left_FT, right_FT = torch.stft(audio_CS, _N_FFT, _HOP, window=window, return_complex=True)
    left, right = _tiles(left_FT.abs().square(), sample_rate), _tiles(right_FT.abs().square(), sample_rate)
    product = _tiles((left_FT * right_FT.conj()).real, sample_rate)
    silence = 1e-12 * (left + right).max() + 1e-20
    level_db = 10 * ((left + silence) / (right + silence)).log10()
    return (
        left + right,
        level_db.clamp(-LOUDEST_DIFFERENCE_DB, LOUDEST_DIFFERENCE_DB),
        product / ((left + silence) * (right + silence)).sqrt(),
    )


def _tiles(values_FT: Tensor, sample_rate: int) -> Tensor:
    """Sum bins to mel bands, and average frames."""
    bands_NT = mel_filterbank(sample_rate, _N_FFT, _BANDS).to(values_FT) @ values_FT
    return torch.nn.functional.avg_pool1d(bands_NT[None], _FRAMES, ceil_mode=True)[0]
