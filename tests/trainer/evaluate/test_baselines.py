"""Codecs by others: tiny random instances of the real classes; the real Opus, LC3 and Codec 2; what is not there."""

from __future__ import annotations

import ast
import io
import math
import os
import sys
import types
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import av
import numpy as np
import pytest
import soundfile
import torch

from tests.trainer.tiny_codecs import save_tiny_codecs
from trainer.evaluate.baselines import BASELINES, Opus, make_baseline, problems_of

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


def burst(seconds: float = 1.0, rate: int = 48_000, seed: int = 0) -> np.ndarray:
    """Noise between 300 Hz and 2.5 kHz, swelling and fading: what Opus keeps in time at a low rate."""
    samples = round(seconds * rate)
    spectrum = np.fft.rfft(np.random.default_rng(seed).normal(size=samples))
    hertz = np.fft.rfftfreq(samples, 1 / rate)
    noise = np.fft.irfft(np.where((hertz > 300) & (hertz < 2500), spectrum, 0), samples)
    return (0.2 * noise / noise.std() * np.sin(np.arange(samples) / rate * 20) ** 2).astype(np.float32)


def lag(original: np.ndarray, decoded: np.ndarray) -> int:
    """Samples by which the decode is behind, where the two are most alike."""
    length = 2 * len(original)
    products = np.fft.irfft(np.conj(np.fft.rfft(original, length)) * np.fft.rfft(decoded, length))
    at = int(products.argmax())
    return at - length if at > length // 2 else at


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    return save_tiny_codecs(tmp_path_factory.mktemp("weights"))


# ---- models of transformers and diffusers


@pytest.mark.parametrize(
    ("spec", "bits_a_second"),
    [("dac@1.7", 2 * 10 * 44_100 / 512), ("encodec@1.5", 2 * 10 * 75), ("encodec@3", 4 * 10 * 75)],
)
@pytest.mark.parametrize("samples", [48_000, 30_011])
def test_a_codec_gives_back_as_much_and_counts_its_codes(weights, spec, bits_a_second, samples):
    codec = make_baseline(spec, weights[spec.partition("@")[0]])
    assert codec.missing() == ""
    codec.load(CPU)
    decoded, bits = codec.code(burst()[:samples], 48_000)
    assert decoded.shape == (samples,)
    assert np.isfinite(decoded).all()
    frames = bits / bits_a_second * (44_100 / 512 if "dac" in spec else 75)
    assert frames == pytest.approx(math.ceil(samples / 48_000 * (44_100 / 512 if "dac" in spec else 75)), abs=1e-9)


def test_the_vae_is_continuous_and_hears_mono_in_both_channels(weights):
    codec = make_baseline("stable_audio", weights["stable_audio"])
    codec.load(CPU)
    audio = burst(rate=44_100)[:20_000]
    decoded, bits = codec.code(audio, 44_100)
    assert bits is None
    padded = torch.nn.functional.pad(torch.from_numpy(audio), (0, 480))[None, None].expand(1, 2, -1)
    with torch.inference_mode():
        latents = codec.model.encode(padded).latent_dist.mode()
        expected = codec.model.decode(latents).sample[0].mean(0)[:20_000]
    np.testing.assert_allclose(decoded, expected.numpy(), atol=1e-6)
    again, _ = codec.code(audio, 44_100)
    np.testing.assert_array_equal(decoded, again)


def test_more_books_than_the_weights_have_are_refused(weights):
    with pytest.raises(ValueError, match="needs 4 codebooks, these weights have 3"):
        make_baseline("dac@3.4", weights["dac"]).load(CPU)


def test_a_pickle_is_not_read(weights, tmp_path):
    (tmp_path / "config.json").write_text((Path(weights["dac"]) / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    codec = make_baseline("dac", str(tmp_path))
    assert "holds no config.json with *.safetensors" in codec.missing()
    with pytest.raises(OSError, match="safetensors"):
        codec.load(CPU)


# ---- Opus


def test_opus_at_its_lowest_codes_every_frame():
    """At a still lower nominal rate, the packets are the same ones or empty."""
    audio, lowest = burst(), Opus.rates[0]

    def packets(kbps: float) -> list[bytes]:
        return [bytes(packet) for packet in Opus(kbps)._encode(audio)[0]]

    assert sum(map(len, packets(lowest))) < sum(map(len, packets(Opus.rates[1])))
    assert min(map(len, packets(lowest))) > 10
    assert packets(lowest - 1) == packets(lowest) != packets(Opus.rates[1])
    assert max(map(len, packets(lowest / 4))) < 5


@pytest.mark.parametrize("kbps", [6, 12, 32])
def test_opus_keeps_time_and_costs_what_it_says(kbps):
    audio = burst(seconds=2.0)
    decoded, bits = make_baseline(f"opus@{kbps}").code(audio, 48_000)
    assert decoded.shape == audio.shape
    assert abs(lag(audio, decoded)) <= 3
    assert bits / 2000 == pytest.approx(kbps, rel=0.4)


def test_opus_of_another_rate_and_of_next_to_nothing():
    audio = burst(rate=44_100)
    decoded, _ = make_baseline("opus@32").code(audio, 44_100)
    assert decoded.shape == audio.shape
    assert abs(lag(audio, decoded)) <= 3
    assert make_baseline("opus@6").code(audio[:5], 44_100)[0].shape == (5,)


def test_opus_sounds_as_by_another_decoder_and_its_packets_are_the_payload():
    """The same sound, written as an Ogg file by FFmpeg's muxer and decoded by libsndfile."""
    audio, file = burst(), io.BytesIO()
    with av.open(file, "w", format="ogg") as container:
        options = {"application": "audio", "frame_duration": "60"}
        stream = container.add_stream("libopus", rate=48_000, options=options, layout="mono")
        stream.bit_rate, stream.format = 64_000, "flt"
        frame = av.AudioFrame.from_ndarray(audio[None], format="flt", layout="mono")
        frame.sample_rate, frame.pts = 48_000, 0
        for part in (frame, None):
            container.mux(stream.encode(part))
    file.seek(0)
    with av.open(file) as container:
        sizes = [packet.size for packet in container.demux(audio=0) if packet.size]
    file.seek(0)
    heard, _ = soundfile.read(file, dtype="float32")

    decoded, bits = make_baseline("opus@64").code(audio, 48_000)
    assert len(sizes) == math.ceil((48_000 + 312) / 2880)  # libopus looks 312 samples ahead
    assert bits == 8 * sum(sizes)
    np.testing.assert_allclose(decoded, heard, atol=2**-14)


# ---- LC3 and Codec 2


@pytest.mark.parametrize("kbps", [16, 32])
def test_lc3_keeps_time_and_costs_whole_frames(kbps):
    pytest.importorskip("lc3", reason="lc3py has wheels for x86_64 and macOS alone")
    codec = make_baseline(f"lc3@{kbps}")
    assert codec.missing() == ""
    codec.load(CPU)
    for rate in (48_000, 44_100):
        audio = burst(seconds=2.0, rate=rate)
        decoded, bits = codec.code(audio, rate)
        assert decoded.shape == audio.shape
        assert lag(audio, decoded) == 0
        assert bits == 201 * kbps * 10  # 2 s and its delay of 2.5 ms, in frames of 10 ms
        assert np.corrcoef(audio, decoded)[0, 1] > 0.7
    assert codec.code(audio[:5], rate)[0].shape == (5,)


def test_lc3_has_no_lower_rate():
    lc3 = pytest.importorskip("lc3", reason="lc3py has wheels for x86_64 and macOS alone")
    for rate in (8000, 16_000, 24_000, 32_000, 48_000):
        encoder = lc3.Encoder(10_000, rate)
        assert encoder.get_frame_bytes(0) * 8 / 10 == BASELINES["lc3"].rates[0]


@pytest.mark.parametrize("kbps", BASELINES["codec2"].rates)
def test_codec_2_keeps_the_time_of_what_it_takes_for_speech(kbps):
    """Its envelope; of the waveform it keeps nothing."""

    def envelope(audio: np.ndarray) -> np.ndarray:
        smooth = np.convolve(audio.astype(float) ** 2, np.hanning(480), "same")
        return smooth - smooth.mean()

    codec = make_baseline(f"codec2@{kbps}")
    assert codec.missing() == ""
    codec.load(CPU)
    lags = []
    for seed in range(4):
        audio = burst(seconds=2.0, seed=seed)
        decoded, bits = codec.code(audio, 48_000)
        assert decoded.shape == audio.shape
        lags.append(lag(envelope(audio), envelope(decoded)) / 48)
        assert bits == pytest.approx(2000 * kbps, abs=40 * kbps)
    assert abs(np.median(lags)) < 6  # ms
    spectrum = np.abs(np.fft.rfft(decoded)) ** 2
    assert spectrum[2 * 4100 :].sum() < 1e-4 * spectrum.sum()
    assert codec.code(audio[:5], 44_100)[0].shape == (5,)


# ---- packages that nobody has to have


def test_what_is_not_installed_says_how_to(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("opus", "lc3", "codec2", "music2latent", "semanticodec", "dac", "stable_audio"):
        codec = make_baseline(name)
        assert "is not installed: pip install" in codec.missing()
        assert not codec.fetches


def test_weights_that_are_nowhere(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    codec = make_baseline("encodec")
    assert "hf download facebook/encodec_24khz" in codec.missing()
    assert not codec.fetches
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as hub:  # answers everything with an error
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        Thread(target=hub.handle_request, daemon=True).start()
        assert codec.fetches
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    assert not codec.fetches
    assert "holds no config.json" in make_baseline("encodec", str(tmp_path)).missing()


def test_music2latent_by_its_own_interface(monkeypatch):
    class EncoderDecoder:
        def __init__(self, load_path_inference, device):
            assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
            assert load_path_inference == "folder/music2latent.pt"

        def encode(self, audio_S):  # cut to whole latents, three hops of 512 aside
            return audio_S[: (len(audio_S) // 512 - 3) // 8 * 4096 + 3 * 512]

        def decode(self, latents):
            return torch.from_numpy(latents)[None]

    monkeypatch.setitem(sys.modules, "music2latent", types.SimpleNamespace(EncoderDecoder=EncoderDecoder))
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    codec = make_baseline("music2latent", "folder")
    codec.load(CPU)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    for samples in (1, 4096, 10_001):
        audio = burst(rate=44_100)[:samples]
        decoded, bits = codec.code(audio, 44_100)
        np.testing.assert_array_equal(decoded, audio)
        assert bits is None


@pytest.mark.parametrize(("kbps", "rate", "vocabulary"), [(1.4, 100, 32_768), (0.68, 50, 16_384), (0.31, 25, 4096)])
def test_semanticodec_by_its_own_interface(monkeypatch, kbps, rate, vocabulary):
    class SemantiCodec:
        def __init__(self, token_rate, semantic_vocab_size):
            assert (token_rate, semantic_vocab_size) == (rate, vocabulary)

        def encode(self, path):
            audio, sample_rate = soundfile.read(path)
            assert sample_rate == 16_000
            return torch.zeros(1, round(len(audio) / 16_000 * rate / 2), 2)

        def decode(self, tokens):
            return np.ones((1, 1, 16_000 * 2), np.float32)

    monkeypatch.setitem(sys.modules, "semanticodec", types.SimpleNamespace(SemantiCodec=SemantiCodec))
    codec = make_baseline(f"semanticodec@{kbps}")
    codec.load(CPU)
    decoded, bits = codec.code(burst(seconds=2.0), 48_000)
    assert decoded.shape == (96_000,)
    assert bits / 2000 == pytest.approx(kbps, abs=0.02)


# ---- their names


def test_what_is_unknown_is_refused_with_the_nearest():
    told = problems_of(["dak@1.7", "dac@1.8", "opus@six", "music2latent@2", "opus", "opus"], {"encodek": "x"})
    for line, expected in zip(
        told,
        [
            "nearest known one is dac",
            "nearest is dac@1.7",
            "write opus@6",
            "write music2latent",
            "opus twice",
            "encodec",
        ],
        strict=True,
    ):
        assert expected in line
    assert problems_of(list(BASELINES), {}) == []


def test_a_name_alone_is_the_rate_of_the_papers_page():
    named = {name: make_baseline(name).spec for name in BASELINES}
    assert named == {
        "opus": "opus@6", "lc3": "lc3@16", "codec2": "codec2@0.7",
        "dac": "dac@1.7", "encodec": "encodec@1.5", "semanticodec": "semanticodec@1.4",
        "stable_audio": "stable_audio", "music2latent": "music2latent",
    }  # fmt: skip
    assert all(kind.licence for kind in BASELINES.values())


def test_nothing_of_others_is_imported_before_it_is_loaded():
    for path in (ROOT / "trainer/evaluate").rglob("*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", None) for node in top}
        others = {
            "av",
            "lc3",
            "pycodec2",
            "aisfx",
            "transformers",
            "diffusers",
            "music2latent",
            "semanticodec",
            "huggingface_hub",
            "visqol",
        }
        assert not others & {str(name).partition(".")[0] for name in names}, path
