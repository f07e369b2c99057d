"""Figures against published implementations, closed forms and what they must say of simple sounds; and the pictures."""

from __future__ import annotations

import math
from pathlib import Path

import auraloss
import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from trainer.evaluate import figures
from trainer.spectrogram import COLOURS, log_mel_image, save_png

RATE = 48_000
CLIP_FIGURES = ["log_mel", "mrstft", "lsd", "si_sdr"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tone(hertz: float, *, seconds: float = 0.5, amplitude: float = 1.0) -> torch.Tensor:
    return amplitude * torch.sin(2 * math.pi * hertz * torch.arange(int(seconds * RATE)) / RATE)


def measure(key: str, reference: torch.Tensor, estimate: torch.Tensor) -> torch.Tensor:
    return figures.clip_figures(reference, estimate, RATE)[key]


# ---- one clip


def test_every_figure_is_explained_and_every_explained_figure_computed():
    clip = figures.clip_figures(noise(4800), noise(4800, seed=1), RATE)
    of_sets = figures.set_figures(noise(8, 4), noise(8, 4, seed=1))
    # D's own error and retrieval are computed in `evaluate`
    assert [*clip, "denoising", *of_sets, "retrieval"] == list(figures.FIGURES)
    assert all(key == figure.key and figure.note for key, figure in figures.FIGURES.items())


@pytest.mark.parametrize(
    ("key", "perfect"), [("log_mel", 0), ("mrstft", 0), ("lsd", 0), ("si_sdr", figures.SI_SDR_LIMIT_DB)]
)
def test_a_clip_against_itself_is_perfect(key, perfect):
    clip = noise(9600)
    assert measure(key, clip, clip) == perfect


@pytest.mark.parametrize("key", CLIP_FIGURES)
def test_more_noise_is_worse(key):
    clip = noise(9600)
    little, much = (measure(key, clip, clip + level * noise(9600, seed=1)) for level in (0.1, 1.0))
    assert (little > much) if figures.FIGURES[key].better == "higher" else (little < much)


@pytest.mark.parametrize("gain_db", [-6.0, 3.0])
@pytest.mark.parametrize("key", ["log_mel", "lsd"])
def test_a_gain_is_as_many_decibels(key, gain_db):
    clip = noise(9600)
    # a few bins of the noise lie on the floor, and what is there cannot fall
    assert measure(key, clip, clip * 10 ** (gain_db / 20)).item() == pytest.approx(abs(gain_db), rel=0.01)


def test_si_sdr_is_the_signal_to_noise_ratio_at_any_gain():
    clip, other = noise(9600), noise(9600, seed=1)
    other -= clip * (clip @ other) / (clip @ clip)
    disturbance = other * clip.norm() / other.norm() / 10
    for gain in (0.01, 1.0, -5.0):
        assert figures.si_sdr(clip, gain * (clip + disturbance)).item() == pytest.approx(20, abs=1e-3)


def test_si_sdr_of_silence_is_the_lower_limit():
    clip, silence = noise(2, 4800), torch.zeros(2, 4800)
    for pair in [(clip, silence), (silence, clip), (silence, silence)]:
        assert figures.si_sdr(*pair).tolist() == [-figures.SI_SDR_LIMIT_DB] * 2


def test_si_sdr_agrees_with_torchmetrics():
    clips = noise(3, 9600)
    estimates = clips * torch.tensor([[1.0], [0.5], [0.1]]) + 0.5 * noise(3, 9600, seed=1)
    torch.testing.assert_close(
        figures.si_sdr(clips, estimates), scale_invariant_signal_distortion_ratio(estimates, clips), rtol=0, atol=1e-3
    )


def test_multi_resolution_stft_agrees_with_auraloss():
    clips, estimates = noise(3, 24_000), noise(3, 24_000, seed=1)
    estimates[1], clips[2] = 0.7 * clips[1], tone(440)
    oracle = auraloss.freq.MultiResolutionSTFTLoss()
    expected = [oracle(found[None, None], clip[None, None]) for clip, found in zip(clips, estimates, strict=True)]
    torch.testing.assert_close(figures.multi_resolution_stft_distance(clips, estimates), torch.stack(expected))


def test_silence_does_not_decide_log_mel():
    clip = torch.cat([tone(1000), torch.zeros(4 * RATE)])
    hiss = 1e-4 * noise(clip.shape[-1])
    assert measure("log_mel", clip, clip + hiss) < 0.05
    assert measure("log_mel", clip, clip + 1e4 * hiss) > 5


def test_the_floor_is_the_references_own():
    quiet, loud = tone(1000, amplitude=1e-3), tone(1000)
    wrong = noise(24_000)
    distances = measure("log_mel", quiet, quiet + 1e-3 * wrong), measure("log_mel", loud, loud + wrong)
    torch.testing.assert_close(*distances, rtol=1e-3, atol=0)


@pytest.mark.parametrize("key", CLIP_FIGURES)
def test_leading_dimensions_are_clips_of_their_own(key):
    clips, estimates = noise(2, 3, 4800), noise(2, 3, 4800, seed=1)
    clips[1, 2] *= 100  # a loud clip must not raise the floor of the others
    together = measure(key, clips, estimates)
    assert together.shape == (2, 3)
    alone = torch.stack([measure(key, clips[i, j], estimates[i, j]) for i in range(2) for j in range(3)])
    torch.testing.assert_close(together.flatten(), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", CLIP_FIGURES)
@pytest.mark.parametrize("samples", [1, 100, 513, 2047])
def test_clips_shorter_than_a_window_have_figures(key, samples):
    assert measure(key, noise(samples), noise(samples, seed=1)).isfinite()


@pytest.mark.parametrize("key", CLIP_FIGURES)
def test_silence_has_finite_figures(key):
    silence, clip = torch.zeros(4800), noise(4800)
    for pair in [(silence, silence), (silence, clip), (clip, silence)]:
        assert measure(key, *pair).isfinite()


@pytest.mark.parametrize("key", CLIP_FIGURES)
def test_clips_of_different_lengths_are_refused(key):
    function = {
        "log_mel": lambda a, b: figures.log_mel_distance(a, b, RATE),
        "mrstft": figures.multi_resolution_stft_distance,
        "lsd": figures.log_spectral_distance,
        "si_sdr": figures.si_sdr,
    }[key]
    with pytest.raises(ValueError, match="same length"):
        function(noise(2, 4800), noise(4800))


# ---- spectra


@pytest.mark.parametrize(("n_fft", "bands"), [(512, 32), (1024, 64), (2048, 128), (1024, 32)])
@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_mel_bands_share_all_bins_and_none_is_empty(rate, n_fft, bands):
    filters = figures.mel_filterbank(rate, n_fft, bands)
    assert filters.shape == (bands, n_fft // 2 + 1)
    assert (filters.sum(1) > 0).all()
    peaks = filters.argmax(1)
    shares = filters.sum(0)[peaks[0] + 1 : peaks[-1]]
    torch.testing.assert_close(shares, torch.ones_like(shares))


def test_mel_scale_is_slaneys():
    # 15 mel at 1 kHz, 42 at 6.4 kHz: with 41 bands up to 6.4 kHz each edge is a whole mel
    filters = figures.mel_filterbank(12_800, 12_800, 41)
    assert filters[:3].argmax(1).tolist() == [67, 133, 200]
    assert filters[14].argmax() == 1000
    assert filters[40].argmax() == round(6400 / 6.4 ** (1 / 27))


def test_a_full_scale_sine_has_power_one():
    assert figures.power_spectrogram(tone(3000), 1024, 256)[:, 20].max().item() == pytest.approx(1, rel=1e-3)


# ---- sets of clips


def gaussian_rows(mean: torch.Tensor, covariance: torch.Tensor, count: int = 50) -> torch.Tensor:
    """Rows with exactly this mean and covariance."""
    rows = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    rows = rows - rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(rows.T))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_of_gaussians_along_the_axes():
    mean_a, mean_b = torch.tensor([[0.0, 1, 2], [1.0, 1, -2]], dtype=torch.float64)
    deviation_a, deviation_b = torch.tensor([[1.0, 2, 3], [3.0, 2, 0.5]], dtype=torch.float64)
    a, b = (
        gaussian_rows(mean, deviation.square().diag(), count)
        for mean, deviation, count in [(mean_a, deviation_a, 50), (mean_b, deviation_b, 70)]
    )
    expected = (mean_a - mean_b).square().sum() + (deviation_a - deviation_b).square().sum()
    assert figures.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_of_gaussians_of_crossed_axes():
    a = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.8], [-0.8, 3.0]], dtype=torch.float64)
    # in two dimensions tr (AB)^½ = (tr AB + 2 (det AB)^½)^½
    overlap = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
    found = figures.frechet_distance(*(gaussian_rows(torch.zeros(2, dtype=torch.float64), c) for c in (a, b)))
    assert found == pytest.approx((a.trace() + b.trace() - 2 * overlap).item(), rel=1e-9)


def test_frechet_holds_with_fewer_rows_than_dimensions():
    few = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert figures.frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    assert figures.frechet_distance(few, few + 0.5) == pytest.approx(64 * 0.25, rel=1e-6)
    other = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    assert figures.frechet_distance(few, other) == pytest.approx(figures.frechet_distance(other, few), rel=1e-9)


def test_frechet_of_a_single_dimension():
    assert figures.frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])) == pytest.approx(16)


def test_kernel_distance_is_the_sum_over_pairs():
    a, b = noise(6, 3, seed=1), noise(5, 3, seed=2) + 0.05
    a, b = a.double(), b.double()
    pairs = [(a[i] - a[j]).norm() for i in range(6) for j in range(i)]
    width = torch.stack(pairs).sort().values[7]  # the lower median of 15

    def kernel(x, y):
        return math.exp(-((x - y).norm() ** 2) / (2 * width**2))

    expected = (
        np.mean([kernel(a[i], a[j]) for i in range(6) for j in range(6) if i != j])
        + np.mean([kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
        - 2 * np.mean([kernel(x, y) for x in a for y in b])
    )
    assert figures.kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased():
    draws = [figures.kernel_distance(noise(20, 8, seed=2 * i), noise(20, 8, seed=2 * i + 1)) for i in range(200)]
    standard_error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws)) < 3 * standard_error
    assert standard_error < 0.003  # or that says nothing: with the diagonal it would be about 0.04
    assert min(draws) < 0


def test_kernel_distance_grows_to_two_and_survives_equal_rows():
    rows = noise(20, 8)
    near, far = (figures.kernel_distance(rows, noise(20, 8, seed=1) + shift) for shift in (0.05, 100.0))
    assert 0 < near < far
    assert figures.kernel_distance(torch.ones(4, 8), torch.zeros(4, 8)) == 2


@pytest.mark.parametrize("rows", [torch.zeros(1, 64), torch.zeros(0, 64), torch.zeros(64)])
def test_too_few_windows_are_refused(rows):
    for distance in (figures.frechet_distance, figures.kernel_distance):
        with pytest.raises(ValueError, match="use more clips, 2 windows are needed"):
            distance(noise(8, 64), rows)


def test_mel_statistics_are_windows_of_half_a_second():
    clips = noise(3, int(2.6 * RATE))
    embedded = figures.mel_statistics(clips, RATE)
    assert embedded.shape == (3 * 5, 64)
    torch.testing.assert_close(embedded[5:10], figures.mel_statistics(clips[1], RATE))
    assert figures.mel_statistics(noise(100), RATE).shape == (1, 64)


def test_mel_statistics_hold_level_and_movement():
    clip = noise(RATE)
    louder, steady = figures.mel_statistics(10 * clip, RATE), figures.mel_statistics(clip, RATE)
    torch.testing.assert_close(louder[:, :32], steady[:, :32] + 2, rtol=0, atol=0.01)  # 20 dB are 2 bels
    torch.testing.assert_close(louder[:, 32:], steady[:, 32:], rtol=0, atol=0.01)
    pulsing = figures.mel_statistics(clip * (1.05 + torch.sin(torch.arange(RATE) / 1000)), RATE)
    assert (pulsing[:, 32:] > steady[:, 32:]).float().mean() > 0.9


def test_the_embedding_tells_sets_of_sounds_apart():
    def embed(low: float, seed: int) -> torch.Tensor:
        hertz = torch.empty(30).uniform_(low, 2 * low, generator=torch.Generator().manual_seed(seed)).tolist()
        clips = torch.stack([tone(h, amplitude=0.3) for h in hertz]) + 0.1 * noise(30, RATE // 2, seed=seed)
        return figures.mel_statistics(clips, RATE)

    alike = figures.set_figures(embed(300, 1), embed(300, 2))
    apart = figures.set_figures(embed(300, 1), embed(3000, 3))
    assert all(apart[key] > 3 * alike[key] for key in apart)


def test_retrieval_is_how_often_the_original_is_the_nearest():
    originals = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [0.0, 4.0]])
    decodes = torch.tensor([[1.0, 0.0], [1.9, 0.0], [9.0, 0.0], [0.5, 3.0], [2.0, 0.0]])
    found = figures.retrieval(originals, decodes, torch.tensor([0, 1, 1, 3, 0]))
    assert found.tolist() == [100, 0, 100, 50, 50]  # the last two have two originals that are equally near
    same = figures.retrieval(originals[:3], torch.ones(3, 2), torch.arange(3))
    assert same.mean() == pytest.approx(100 / 3)  # whoever always answers the same is right by chance


# ---- pictures


def lightness(image: np.ndarray) -> np.ndarray:
    return image.astype(float) @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize(("hertz", "lit"), [(100, slice(48, 64)), (16_000, slice(0, 16))])
def test_low_tones_light_the_bottom_and_high_ones_the_top(hertz, lit):
    image = log_mel_image(tone(hertz), RATE, height=64, width=40)
    assert image.shape == (64, 40, 3)
    assert image.dtype == np.uint8
    brightest = lightness(image).mean(1).argmax()
    assert lit.start <= brightest < lit.stop


def test_time_runs_from_left_to_right():
    click = torch.zeros(RATE)
    click[int(0.8 * RATE)] = 1
    assert lightness(log_mel_image(click, RATE, height=32, width=100)).mean(0).argmax() == pytest.approx(80, abs=1)


def test_without_a_width_there_is_a_column_each_10_ms():
    assert log_mel_image(noise(2, int(1.5 * RATE)), RATE, height=32).shape == (32, 150, 3)
    assert log_mel_image(noise(1), RATE, height=32).shape == (32, 1, 3)


def test_a_gain_does_not_change_the_picture():
    clip = noise(RATE)
    plain, quiet = (log_mel_image(gain * clip, RATE, height=32) for gain in (1.0, 0.125))
    assert np.array_equal(plain, quiet)


@pytest.mark.parametrize("audio", [torch.zeros(4800), torch.full((4800,), float("nan")), 1e-7 * noise(4800)])
def test_silence_is_dark(audio):
    assert (log_mel_image(audio, RATE, height=16, width=16) == COLOURS[0]).all()


def test_louder_is_lighter():
    steps = np.diff(lightness(COLOURS))
    assert (steps > 0).all()


def test_a_png_keeps_the_colours_in_a_palette(tmp_path: Path):
    image = log_mel_image(noise(RATE) * torch.linspace(0, 1, RATE) ** 4, RATE, height=64, width=128)
    save_png(image, tmp_path / "clip.png")
    with Image.open(tmp_path / "clip.png") as saved:
        assert saved.mode == "P"
        assert np.array_equal(np.asarray(saved.convert("RGB")), image)
