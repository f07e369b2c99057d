from __future__ import annotations

import math
from pathlib import Path

import pytest
import soundfile
import torch

from models.autoencoder import AudioAE, SpectralAE, VocosAE
from models.autoencoder_sizes import VocosConfig
from models.magnitude_autoencoder import MagnitudeAE
from tests.system_packages import require

SPEECH = Path("/usr/share/sounds/alsa")  # 48 kHz, of alsa-utils
TINY = VocosConfig(latent_channels=8, width=16, hidden_width=24, encoder_depth=2, decoder_depth=2)


def vocos() -> VocosAE:
    torch.manual_seed(0)
    return VocosAE(TINY)


@pytest.fixture(params=[SpectralAE, MagnitudeAE, vocos], ids=["spectral", "magnitude", "vocos"])
def ae(request) -> AudioAE:
    return request.param()


@pytest.mark.parametrize("samples", [96_000, 96_001, 96_480, 96_481])
def test_blocks_join_as_if_there_were_one(ae, samples, monkeypatch):
    """Encoded and decoded in blocks of 40 frames; noise and first phases, too, are those of their place."""
    audio, read = noise(samples), []
    x0 = ae.encode(audio)
    decoded = ae.decode(x0)
    monkeypatch.setattr("models.autoencoder.FRAMES_PER_BLOCK", 40)

    def piece(first: int, last: int) -> torch.Tensor:
        read.append(last - first)
        return audio[..., first:last]

    torch.testing.assert_close(ae.encode_blocks(piece, samples), x0)
    assert len(read) > 2
    assert max(read) <= (40 + 2 * ae.context) * ae.hop
    blocks = list(ae.decode_blocks(x0))
    assert max(block.shape[-1] for block in blocks) <= 40 * ae.hop
    torch.testing.assert_close(torch.cat(blocks, dim=-1), decoded)
    torch.testing.assert_close(ae.decode(x0), decoded)


def test_a_context_too_short_shows_where_blocks_join(ae, monkeypatch):
    audio = noise(48_000)
    x0 = ae.encode(audio)
    monkeypatch.setattr("models.autoencoder.FRAMES_PER_BLOCK", 40)
    monkeypatch.setattr(ae, "context", 0)
    assert (ae.encode(audio) - x0).abs().max() > 1e-3


def tone(frequency: float, seconds: float = 1.0, amplitude: float = 0.3) -> torch.Tensor:
    time = torch.arange(round(48000 * seconds)) / 48000
    return amplitude * torch.sin(2 * math.pi * frequency * time)[None, None]


def noise(samples: int = 24000, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


def si_sdr(reference: torch.Tensor, estimate: torch.Tensor) -> torch.Tensor:
    target = reference * (reference * estimate).sum(-1, keepdim=True) / reference.square().sum(-1, keepdim=True)
    return 10 * torch.log10(target.square().sum(-1) / (estimate - target).square().sum(-1))


def band_levels(audio: torch.Tensor) -> torch.Tensor:
    """Power in dB of 24 bands of 1 kHz."""
    power = torch.fft.rfft(audio[..., : audio.shape[-1] // 48 * 48]).abs().square()
    return 10 * torch.log10(power[..., 1:].unflatten(-1, (24, -1)).mean(-1) + 1e-12)


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    """Six recorded clips of 1.2 s at -23 dBFS, `(6, 1, 57600)`."""
    require("alsa-utils")
    paths = sorted(path for path in SPEECH.glob("*.wav") if "Noise" not in path.name)[:6]
    clips = torch.stack([torch.from_numpy(soundfile.read(path, dtype="float32")[0][:57600]) for path in paths])
    return (clips * 10 ** (-23 / 20) / clips.square().mean(1, keepdim=True).sqrt())[:, None]


@pytest.mark.parametrize("samples", [1, 479, 480, 481, 960, 1000, 24000])
def test_shapes_of_any_length(ae, samples):
    audio = noise(samples)
    x0 = ae.encode(audio)
    assert ae.frames(samples) == math.ceil(samples / ae.hop) + 1
    assert x0.shape == (1, ae.latent_channels, ae.frames(samples))
    assert x0.dtype == torch.float32
    assert ae.decode(x0).shape == (1, ae.channels, (ae.frames(samples) - 1) * ae.hop)
    assert ae.decode(x0).isfinite().all()


def test_silence_is_finite_and_stays_silent(ae):
    x0 = ae.encode(torch.zeros(1, 1, 4800))
    assert x0.isfinite().all()
    assert ae.decode(x0).isfinite().all()
    if not isinstance(ae, VocosAE):
        assert ae.decode(x0).abs().max() < 1e-5


def test_batch_gives_what_single_clips_give(ae):
    audio = noise(batch=3)
    x0 = ae.encode(audio)
    torch.testing.assert_close(torch.cat([ae.encode(clip[None]) for clip in audio]), x0, atol=1e-4, rtol=1e-4)
    tolerance = 1e-4 if isinstance(ae, MagnitudeAE) else 1e-5  # its iterations amplify rounding
    single = torch.cat([ae.decode(clip[None]) for clip in x0])
    torch.testing.assert_close(single, ae.decode(x0), atol=tolerance, rtol=1e-4)


def test_the_end_is_padded_with_zeros(ae):
    audio = noise(1000)
    padded = torch.nn.functional.pad(audio, (0, 440))
    assert torch.equal(ae.encode(audio), ae.encode(padded))


def test_decoding_is_deterministic_and_leaves_the_generator_alone(ae):
    x0 = ae.encode(noise())
    state = torch.get_rng_state()
    first = ae.decode(x0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(ae.decode(x0), first)


def test_autocast_and_half_precision_latents_do_not_change_the_computation(ae):
    audio = noise()
    expected = ae.encode(audio)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ae.encode(audio), expected)
        assert torch.equal(ae.decode(expected), ae.decode(expected.float()))
    assert ae.decode(expected.half()).dtype == torch.float32


def test_convolutions_on_a_gpu_do_not_round_to_tf32(ae, monkeypatch):
    seen = []
    for name in ("_encode", "_decode"):
        plain = getattr(ae, name)

        def watched(*given: object, plain=plain) -> torch.Tensor:
            seen.append(torch.backends.cudnn.allow_tf32)
            return plain(*given)

        monkeypatch.setattr(ae, name, watched)
    before = torch.backends.cudnn.allow_tf32
    ae.decode(ae.encode(torch.randn(1, ae.channels, 4 * ae.hop)))
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32 == before


def test_nothing_is_trained(ae):
    assert not any(parameter.requires_grad for parameter in ae.parameters())


@pytest.mark.parametrize("shape", [(1, 2, 480), (480,), (1, 480), (1, 1, 0)])
def test_audio_of_another_shape_is_refused(ae, shape):
    with pytest.raises(ValueError, match=r"takes \(batch, 1, samples\).*mix"):
        ae.encode(torch.zeros(shape))


@pytest.mark.parametrize("frames", [0, 1])
def test_latents_of_another_shape_are_refused(ae, frames):
    with pytest.raises(ValueError, match="at least two frames"):
        ae.decode(torch.zeros(1, ae.latent_channels, frames))
    with pytest.raises(ValueError, match=rf"\(batch, {ae.latent_channels}, frames\)"):
        ae.decode(torch.zeros(1, ae.latent_channels + 1, 10))


def test_identity_tells_autoencoders_apart_and_nothing_else():
    other = vocos()
    with torch.no_grad():
        other.to_latents.weight[0] += 1
    identities = [SpectralAE().identity(), vocos().identity(), other.identity(), MagnitudeAE().identity()]
    assert len(set(identities)) == 4
    assert identities[:2] == [SpectralAE().identity(), vocos().identity()]
    wider = VocosAE(VocosConfig(8, 16, 24, 2, 2, n_fft=1024))
    assert wider.identity() not in identities


def test_spectral_identity_is_pinned():
    """Shards on disks depend on it: whoever changes the formula raises the version in the config, and this with it."""
    assert SpectralAE().identity() == "d56c75bf07da"


def test_spectral_keeps_the_waveform_below_4800_hz():
    low = tone(440) + tone(1234.5) + tone(4500)
    assert si_sdr(low, SpectralAE().decode(SpectralAE().encode(low))).item() > 35


def test_spectral_keeps_the_level_but_not_the_waveform_above():
    ae, audio = SpectralAE(), noise(48000)
    decoded = ae.decode(ae.encode(audio))
    assert (band_levels(decoded) - band_levels(audio)).abs().max() < 1
    high = tone(9000)
    replaced = ae.decode(ae.encode(high))
    assert replaced.square().mean().item() == pytest.approx(high.square().mean().item(), rel=0.1)
    assert si_sdr(high, replaced).item() < 5


def test_spectral_fills_bands_with_noise_and_not_with_a_pattern():
    decoded = SpectralAE().decode(torch.zeros(1, 128, 200))[0, 0]
    for lag in (240, 480, 960):
        assert torch.corrcoef(torch.stack((decoded[lag:], decoded[:-lag])))[0, 1].abs() < 0.05


def test_spectral_frames_are_centred_on_hop_boundaries():
    click = torch.zeros(1, 1, 9600)
    click[..., 4800] = 1
    x0 = SpectralAE().encode(click)[0]
    assert x0[96:].mean(0).argmax().item() == 10
    assert (x0 - x0[:, :1]).abs().amax(0)[[8, 9, 12]].max() == 0


def test_spectral_on_recorded_speech(speech):
    ae = SpectralAE()
    x0 = ae.encode(speech)
    assert si_sdr(speech, ae.decode(x0)).median().item() > 12
    assert (band_levels(ae.decode(x0)) - band_levels(speech)).abs().median().item() < 1
    assert x0.mean().abs().item() < 0.5
    assert 0.5 < x0.std().item() < 1.5


def test_spectral_survives_noise_on_its_latents(speech):
    ae = SpectralAE()
    x0 = ae.encode(speech)
    noisy = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    assert si_sdr(speech, ae.decode(noisy)).median().item() > 10


def test_spectral_of_wild_latents_is_finite():
    assert SpectralAE().decode(torch.full((1, 128, 4), 50.0)).isfinite().all()


def test_vocos_normalises_its_latents():
    ae, audio = vocos(), noise()
    raw = ae.encode(audio)
    ae.mean.fill_(0.5)
    ae.spread.fill_(2)
    torch.testing.assert_close(ae.encode(audio), (raw - 0.5) / 2)
    decoded = ae.decode(ae.encode(audio))
    ae.mean.zero_()
    ae.spread.fill_(1)
    torch.testing.assert_close(decoded, ae.decode(raw), atol=1e-5, rtol=1e-4)
