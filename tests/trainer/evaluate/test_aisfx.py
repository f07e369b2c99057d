"""The embedding by aisfx: its mel spectrogram against Essentia's, its network against the package's own."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.evaluate.embeddings import Aisfx, MelStatistics, make_embedding, problem_of
from trainer.evaluate.embeddings.aisfx import SAMPLE_RATE, load_network, mel_spectrogram
from trainer.evaluate.figures import kernel_distance, retrieval

CPU = torch.device("cpu")
installed = pytest.mark.skipif(bool(Aisfx.missing()), reason=Aisfx.missing())

BANDS = (0, 1, 5, 20, 40, 60, 80, 95)
ESSENTIA = {
    0: (6.3148, 6.3841, 7.1881, 3.4510, 1.5406, 0.3366, 0.0323, 0.0111),
    1: (2.2817, 2.6093, 5.0230, 2.9769, 0.0000, 0.0000, 0.0000, 0.0000),
    7: (0.0000, 0.0000, 0.0000, 0.0002, 5.6341, 0.0000, 0.0000, 0.0000),
    14: (1.6173, 1.6174, 1.6192, 1.6611, 2.0453, 2.3371, 0.9919, 0.7103),
    20: (0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 2.4611, 0.0000, 0.0000),
    26: (0.0042, 0.0042, 0.0042, 0.0043, 0.0053, 0.0251, 0.0027, 0.0005),
}
"""Frame → the values of `BANDS` in the mel spectrogram of `sweep()`, by Essentia 2.1b6.dev1389 as aisfx sets it."""


def sweep() -> np.ndarray:
    """A falling tone of rising pitch, which becomes much softer in the middle."""
    seconds = np.arange(26_500) / SAMPLE_RATE
    tone = 0.3 * np.sin(2 * np.pi * (150 + 6000 * seconds) * seconds) * (1 - seconds)
    tone[15_000:] *= 0.01
    return tone.astype(np.float32)


def test_the_mel_spectrogram_is_essentias():
    found = mel_spectrogram(torch.from_numpy(sweep()))
    assert found.shape == (27, 96)
    for frame, expected in ESSENTIA.items():
        torch.testing.assert_close(found[frame, list(BANDS)], torch.tensor(expected), atol=2e-4, rtol=0)


@pytest.mark.parametrize("samples", [1, 500, 1024, 2049, 44_032, 44_033])
def test_the_mel_spectrogram_has_essentias_frames_at_any_length(samples):
    standard = pytest.importorskip("essentia.standard")
    audio = (0.1 * np.random.default_rng(samples).normal(size=samples)).astype(np.float32)
    window = standard.Windowing(type="hann", normalized=False)
    bands = standard.MelBands(
        inputSize=1025, numberBands=96, sampleRate=44_100, lowFrequencyBound=0, highFrequencyBound=22_050,
        warpingFormula="htkMel", weighting="warping", normalize="unit_sum", type="power", log=False,
    )  # fmt: skip
    frames = standard.FrameGenerator(audio, frameSize=2048, hopSize=1024)
    expected = np.log10(1e4 * np.array([bands(standard.Spectrum()(window(frame))) for frame in frames]) + 1)
    np.testing.assert_allclose(mel_spectrogram(torch.from_numpy(audio)).numpy(), expected, atol=1e-4)


@installed
def test_the_network_is_the_packages_own():
    package = importlib.import_module("aisfx")
    theirs = importlib.import_module("aisfx.models.cnn2d").EmbeddingNet("max", 3, 1, 64).eval()
    ours = load_network(Path(str(package.__file__)).parent / "models/checkpoint.pth")
    theirs.load_state_dict(ours.state_dict())
    blocks = torch.rand(2, 100, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs(blocks)
        torch.testing.assert_close(ours(blocks[:, None]), expected)
    assert expected.std() > 0.1


@installed
def test_a_row_is_a_block_of_100_frames_every_50():
    embedding = make_embedding("aisfx", CPU)
    audio_S = torch.from_numpy(np.tile(sweep(), 6))[None]
    mel = mel_spectrogram(audio_S[0]) / 9.457798957824707
    with torch.inference_mode():
        rows = embedding(audio_S, SAMPLE_RATE)
        assert len(mel) == 157
        expected = embedding._network(torch.stack([mel[:100], mel[50:150]])[:, None])
        torch.testing.assert_close(rows, expected)
        short = embedding(audio_S[:, :30_000], SAMPLE_RATE)
        assert short.shape == (1, 512)
        twice = torch.from_numpy(np.repeat(sweep(), 2))[None]  # the same sound an octave lower, or at twice the rate
        apart = (embedding(twice, SAMPLE_RATE) - short).norm()
        assert (embedding(twice, 2 * SAMPLE_RATE) - embedding(audio_S[:, :26_500], SAMPLE_RATE)).norm() < apart / 4


def kinds(count: int) -> torch.Tensor:
    """Bursts of noise, each in bands and a rhythm of its own: (count, 1, samples)."""
    samples = round(2.4 * SAMPLE_RATE)
    seconds, hertz = np.arange(samples) / SAMPLE_RATE, np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    made = []
    for number in range(count):
        noise = np.fft.rfft(np.random.default_rng(number).normal(size=samples))
        comb = np.cos(hertz / (30 + 25 * number)) ** 8 + 1e-3
        sound = np.fft.irfft(noise * comb / (1 + hertz / 2000), samples) * np.exp(
            -(seconds % (0.1 + 0.13 * number)) * 9
        )
        made.append(0.1 * sound / sound.std())
    return torch.tensor(np.array(made), dtype=torch.float32)[:, None]


@installed
def test_distances_grow_with_what_is_lost():
    embedding, sounds = make_embedding("aisfx", CPU), kinds(6)

    def rows(audio_C1S: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([embedding(audio_1S, SAMPLE_RATE) for audio_1S in audio_C1S])

    def low_pass(hertz: float) -> torch.Tensor:
        spectrum = torch.fft.rfft(sounds)
        spectrum[..., round(hertz * sounds.shape[-1] / SAMPLE_RATE) :] = 0
        return torch.fft.irfft(spectrum, sounds.shape[-1])

    originals, soft, hard = rows(sounds), rows(low_pass(12_000)), rows(low_pass(1500))
    assert kernel_distance(originals, originals) < kernel_distance(originals, soft) < kernel_distance(originals, hard)
    assert retrieval(originals, soft, torch.arange(6)).mean() > 80


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """A package of that name, found before any other, which can't be imported."""
    (folder / "aisfx/models").mkdir(parents=True)
    (folder / "aisfx/__init__.py").write_text("raise ImportError('nobody imports it')")
    (folder / "aisfx/models/checkpoint.pth").write_bytes(content)
    monkeypatch.delitem(sys.modules, "aisfx", raising=False)
    monkeypatch.syspath_prepend(folder)


def test_auto_is_aisfx_where_its_own_weights_are(tmp_path, monkeypatch):
    fake_package(tmp_path, monkeypatch, b"other weights")
    assert "pip install --no-deps aisfx==0.1.2" in Aisfx.missing()
    assert isinstance(make_embedding("auto", CPU), MelStatistics)
    assert problem_of("auto") == problem_of("mel-stat") == problem_of("clap:x") == ""
    assert "evaluate.embedding=aisfx: the package aisfx 0.1.2 is not installed" in problem_of("aisfx")
    assert "neither auto, aisfx, mel-stat nor clap:FOLDER_OR_NAME" in problem_of("clap:")
    with pytest.raises(ValueError, match=r"evaluate\.embedding=aisfx: the package aisfx 0\.1\.2 is not installed"):
        make_embedding("aisfx", CPU)(torch.zeros(1, 1000), SAMPLE_RATE)


@installed
def test_auto_is_aisfx_where_it_is_installed():
    embedding = make_embedding("auto", CPU)
    assert isinstance(embedding, Aisfx)
    assert embedding.name == embedding.identity == "aisfx 0.1.2"
    assert problem_of("aisfx") == ""


class _Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("unpickled",)


def test_no_pickle_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save((_Payload(), {}), tmp_path / "checkpoint.pth")
    with pytest.raises(Exception, match="mkdir"):
        load_network(tmp_path / "checkpoint.pth")
    assert not Path("unpickled").exists()
