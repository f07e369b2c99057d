"""Figures of how close a decoded clip is to its original, and how close one set of clips is to another.

Audio is `(..., samples)`, where every leading index is a separate clip; figures of clips have the shape `(...)`.
Everything is computed from the signals alone, without downloads. `FIGURES` explains each figure.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.loudness import is_silent

FLOOR_DB = 60.0
"""Spectra are floored this far below the reference's loudest point; otherwise silence would dominate."""
SI_SDR_LIMIT_DB = 60.0
"""SI-SDR is clamped to ± this limit, beyond which there are only identical, silent and unrelated signals."""
EMBEDDING = "mel-stat"
"""Name of the embedding by `mel_statistics`, to be shown wherever a distance over it is shown."""

_SILENCE = 1e-14  # -140 dB of full scale: keeps the logarithm finite where the reference itself is silent
_MEL_RESOLUTIONS = (512, 1024, 2048)
_STFT_RESOLUTIONS = ((512, 50, 240), (1024, 120, 600), (2048, 240, 1200))  # n_fft, hop, window


@dataclass(frozen=True)
class Figure:
    """A figure as the tables and the page show it."""

    key: str
    title: str
    unit: str
    better: str
    """Which way is better: "lower" or "higher"."""
    note: str
    digits: int | None = None
    """Digits after the decimal point; None: as many as the values need."""
    chance: float | None = None
    """The mean that guessing would have; None if the figure can't be guessed."""


FIGURES = {
    figure.key: figure
    for figure in (
        Figure(
            key="log_mel",
            title="Log-mel distance",
            unit="dB",
            better="lower",
            note="The mean error of the mel spectrogram in decibels, over three resolutions. Everything more than "
            f"{FLOOR_DB:.0f} dB below the loudest point of the original counts as silence.",
            digits=2,
        ),
        Figure(
            key="mrstft",
            title="Multi-resolution STFT",
            unit="",
            better="lower",
            note="The spectral convergence plus the log-magnitude error, averaged over three STFT resolutions.",
        ),
        Figure(
            key="lsd",
            title="Log-spectral distance",
            unit="dB",
            better="lower",
            note="The root-mean-square error of a frame's log spectrum, averaged over the frames. It has the same "
            "floor as the log-mel distance.",
        ),
        Figure(
            key="si_sdr",
            title="SI-SDR",
            unit="dB",
            better="higher",
            note="It shows how well the waveform itself is preserved, at any gain. It says little at very low rates, "
            "where sounds are synthesized again rather than copied. Values are clamped to "
            f"±{SI_SDR_LIMIT_DB:.0f} dB.",
        ),
        Figure(
            key="denoising",
            title="Denoising error",
            unit="",
            better="lower",
            note="The training loss on these clips: the error of D when it denoises x0 given this z, at eight noise "
            "levels, with the same noise for every system. No sample is drawn, so the value does not depend on chance.",
            digits=4,
        ),
        Figure(
            key="frechet",
            title="Fréchet distance",
            unit="",
            better="lower",
            note="The distance between the set of all originals and the set of all decodes. It shows whether the "
            "decodes are plausible as a whole. It is biased upwards if there are few clips.",
        ),
        Figure(
            key="kernel",
            title="Kernel distance",
            unit="",
            better="lower",
            note="It compares the same sets as the Fréchet distance, by the squared maximum mean discrepancy with a "
            "Gaussian kernel. It is unbiased for few clips, so it may be slightly below zero.",
        ),
        Figure(
            key="retrieval",
            title="Retrieval",
            unit="%",
            better="higher",
            note="How often the original is the nearest of all scored originals to its decode. It shows whether a "
            "decode can be told from the other sounds.",
            digits=1,
        ),
    )
}


def sounding_channels(reference: Tensor) -> list[int]:
    """Return the channels of a clip (channels, samples) that are not silent, which figures are averaged over."""
    return [channel for channel in range(len(reference)) if not is_silent(reference[channel : channel + 1])] or [0]


def clip_figures(reference: Tensor, estimate: Tensor, sample_rate: int) -> dict[str, Tensor]:
    """Return all figures that compare a clip with its original, by their keys in `FIGURES`."""
    return {
        "log_mel": log_mel_distance(reference, estimate, sample_rate),
        "mrstft": multi_resolution_stft_distance(reference, estimate),
        "lsd": log_spectral_distance(reference, estimate),
        "si_sdr": si_sdr(reference, estimate),
    }


def set_figures(reference: Tensor, estimate: Tensor) -> dict[str, float]:
    """Return all figures that compare two sets of embeddings, `(windows, dim)` each, by their keys in `FIGURES`."""
    return {"frechet": frechet_distance(reference, estimate), "kernel": kernel_distance(reference, estimate)}


# ---- figures of one clip and its original


def log_mel_distance(reference: Tensor, estimate: Tensor, sample_rate: int) -> Tensor:
    """Return the mean absolute log-mel difference in dB, averaged over n_fft 512, 1024 and 2048 (hop n_fft/4).

    `(..., samples)` twice → `(...)`. Both spectrograms are floored `FLOOR_DB` below the reference's maximum.
    """
    _require_same_shape(reference, estimate)
    distances = []
    for n_fft in _MEL_RESOLUTIONS:
        cut = {"n_fft": n_fft, "hop": n_fft // 4, "bands": n_fft // 16}
        energies = (mel_energies(audio, sample_rate, **cut) for audio in (reference, estimate))
        reference_db, estimate_db = _floored_decibels(*energies)
        distances.append((reference_db - estimate_db).abs().mean((-2, -1)))
    return torch.stack(distances).mean(0)


def multi_resolution_stft_distance(reference: Tensor, estimate: Tensor) -> Tensor:
    """Return spectral convergence plus log-magnitude L1, averaged over three resolutions (arXiv 1910.11480).

    `(..., samples)` twice → `(...)`.
    """
    _require_same_shape(reference, estimate)
    distances = []
    for n_fft, hop, window_length in _STFT_RESOLUTIONS:
        target, found = (_power(a, n_fft, hop, window_length).clamp(min=1e-8).sqrt() for a in (reference, estimate))
        convergence = (target - found).square().sum((-2, -1)).sqrt() / target.square().sum((-2, -1)).sqrt()
        distances.append(convergence + (target.log() - found.log()).abs().mean((-2, -1)))
    return torch.stack(distances).mean(0)


def log_spectral_distance(reference: Tensor, estimate: Tensor) -> Tensor:
    """Return the RMS difference in dB over the bins of a frame (n_fft 2048, hop 512), averaged over frames.

    `(..., samples)` twice → `(...)`. Both spectra are floored `FLOOR_DB` below the reference's maximum.
    """
    _require_same_shape(reference, estimate)
    reference_db, estimate_db = _floored_decibels(*(power_spectrogram(a, 2048, 512) for a in (reference, estimate)))
    return (reference_db - estimate_db).square().mean(-2).sqrt().mean(-1)


def si_sdr(reference: Tensor, estimate: Tensor) -> Tensor:
    """Return the scale-invariant signal-to-distortion ratio in dB (arXiv 1811.02508), clamped to ±`SI_SDR_LIMIT_DB`.

    `(..., samples)` twice → `(...)`. A perfect estimate has the upper limit at any gain. If either signal is silent,
    the result is the lower limit.
    """
    _require_same_shape(reference, estimate)
    target, found = reference.double(), estimate.double()
    tiny = torch.finfo(torch.float64).tiny
    gain = (target * found).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True).clamp(min=tiny)
    signal = (gain * target).square().sum(-1)
    distortion = (found - gain * target).square().sum(-1).clamp(min=tiny)
    ratio_db = 10 * (signal / distortion).log10()
    return ratio_db.clamp(-SI_SDR_LIMIT_DB, SI_SDR_LIMIT_DB).to(reference.dtype)


# ---- distances between two sets of clips


def mel_statistics(audio: Tensor, sample_rate: int) -> Tensor:
    """Compute the `EMBEDDING`: mean and standard deviation of 32 log-mel bands over half a second, in bels (dB/10).

    `(..., samples)` → `(windows, 64)`, concatenated over the clips. An incomplete last window is dropped; a clip
    shorter than a window is padded to one.
    """
    hop, frames_per_window = sample_rate // 100, 50
    missing = max(0, hop * frames_per_window - audio.shape[-1])
    energies = mel_energies(F.pad(audio, (0, missing)), sample_rate, n_fft=1024, hop=hop, bands=32)
    bels = energies.clamp(min=1e-7).log10()  # the floor hides differences between near-silent windows
    windows = bels.unfold(-1, frames_per_window, frames_per_window)  # (..., bands, windows, frames)
    statistics = torch.cat([windows.mean(-1), windows.std(-1)], dim=-2)
    return statistics.transpose(-2, -1).reshape(-1, statistics.shape[-2])


def retrieval(originals: Tensor, decodes: Tensor, own: Tensor) -> Tensor:
    """Return for each decode whether its original is the nearest of all originals: 100 or 0, in percent.

    If several originals are equally near, as copies of one sound are, the 100 % are divided among them.

    Args:
        originals: (clips, dim), the mean over a clip's embedding.
        decodes: (decodes, dim), likewise.
        own: (decodes,), the row of each decode's own original.

    Returns:
        float64 (decodes,).
    """
    distances = torch.cdist(decodes.double(), originals.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances == distances.amin(1, keepdim=True)
    return 100.0 * nearest.gather(1, own[:, None])[:, 0] / nearest.sum(1)


def frechet_distance(reference: Tensor, estimate: Tensor) -> float:
    """Return the Fréchet distance between Gaussians fitted to two sets (arXiv 1706.08500, eq. 6; arXiv 1812.08466).

    `(windows, dim)` twice, of at least two rows each. Fewer rows than dimensions are possible, but bias the result
    upwards.
    """
    (mean_a, root_a), (mean_b, root_b) = (_gaussian(_require_rows(rows)) for rows in (reference, estimate))
    # trace (A B)^½ is the sum of the singular values of A^½ B^½; the root of A B itself would suffer from rounding
    overlap = torch.linalg.svdvals(root_a @ root_b).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * overlap
    return max(0.0, float(distance))


def kernel_distance(reference: Tensor, estimate: Tensor) -> float:
    """Return the unbiased squared maximum mean discrepancy of two sets of embeddings, as in KAD (arXiv 2502.15602).

    `(windows, dim)` twice, of at least two rows each. The bandwidth of the Gaussian kernel is the median distance in
    the reference. Equal distributions give 0 on average, so a value may be slightly negative; the maximum is 2.
    """
    a, b = _require_rows(reference), _require_rows(estimate)
    bandwidth = torch.pdist(a).median().clamp(min=1e-12)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return (-0.5 * (distances / bandwidth).square()).exp()

    def mean_within(x: Tensor) -> Tensor:
        return (kernel(x, x).sum() - len(x)) / (len(x) * (len(x) - 1))  # without the biasing diagonal

    return float(mean_within(a) + mean_within(b) - 2 * kernel(a, b).mean())


def _gaussian(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the symmetric square root of the covariance."""
    variances, axes = torch.linalg.eigh(torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1]))
    return rows.mean(0), (axes * variances.clamp(min=0).sqrt()) @ axes.T


def _require_rows(embeddings: Tensor) -> Tensor:
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"embeddings of shape {tuple(embeddings.shape)}: use more clips, 2 windows are needed")
    return embeddings.double()


# ---- spectra


def power_spectrogram(audio: Tensor, n_fft: int, hop: int) -> Tensor:
    """Compute the power of a Hann-windowed STFT, `(..., samples)` → `(..., n_fft/2 + 1, frames)`.

    A full-scale sine has power 1.
    """
    return _power(audio, n_fft, hop, n_fft) / (n_fft / 4) ** 2  # n_fft / 4 is half the sum of the window


def mel_energies(audio: Tensor, sample_rate: int, *, n_fft: int, hop: int, bands: int) -> Tensor:
    """Compute the energy in mel bands, `(..., samples)` → `(..., bands, frames)`."""
    filters = mel_filterbank(sample_rate, n_fft, bands).to(audio)
    return filters @ power_spectrogram(audio, n_fft, hop)


@functools.lru_cache(maxsize=16)
def mel_filterbank(sample_rate: int, n_fft: int, bands: int) -> Tensor:
    """Return triangles of height 1, evenly spaced on Slaney's mel scale up to Nyquist: `(bands, n_fft/2 + 1)`."""
    edges = _hertz(torch.linspace(0, _mel(sample_rate / 2), bands + 2, dtype=torch.float64))
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    lower, centre, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - lower) / (centre - lower), (upper - bins) / (upper - centre)
    return torch.minimum(rising, falling).clamp(min=0).float()


# Slaney's scale is linear up to 1 kHz, which is 15 mel; above 1 kHz each factor of 6.4 adds 27 mel.
_LINEAR_HERTZ, _LINEAR_MEL, _LOG_STEP = 1000.0, 15.0, math.log(6.4) / 27


def _mel(hertz: float) -> float:
    if hertz < _LINEAR_HERTZ:
        return hertz * _LINEAR_MEL / _LINEAR_HERTZ
    return _LINEAR_MEL + math.log(hertz / _LINEAR_HERTZ) / _LOG_STEP


def _hertz(mel: Tensor) -> Tensor:
    linear = mel * _LINEAR_HERTZ / _LINEAR_MEL
    return torch.where(mel < _LINEAR_MEL, linear, _LINEAR_HERTZ * ((mel - _LINEAR_MEL) * _LOG_STEP).exp())


def _power(audio: Tensor, n_fft: int, hop: int, window_length: int) -> Tensor:
    clips = audio.reshape(-1, audio.shape[-1])
    clips = F.pad(clips, (0, max(0, n_fft - audio.shape[-1])))  # the STFT's reflect padding needs n_fft samples
    window = torch.hann_window(window_length, dtype=audio.dtype, device=audio.device)
    spectrum = torch.stft(clips, n_fft, hop, window_length, window, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    return power.reshape(*audio.shape[:-1], *power.shape[1:])


def _floored_decibels(reference: Tensor, estimate: Tensor) -> tuple[Tensor, Tensor]:
    """Convert powers `(..., bands, frames)` to dB, floored `FLOOR_DB` below the reference's maximum in the clip."""
    floor = (reference.amax((-2, -1), keepdim=True) * 10 ** (-FLOOR_DB / 10)).clamp(min=_SILENCE)
    return 10 * reference.maximum(floor).log10(), 10 * estimate.maximum(floor).log10()


def _require_same_shape(reference: Tensor, estimate: Tensor) -> None:
    if reference.shape != estimate.shape:
        shapes = f"{tuple(reference.shape)} and {tuple(estimate.shape)}"
        raise ValueError(f"reference and estimate differ in shape, {shapes}: cut both to the same length")
