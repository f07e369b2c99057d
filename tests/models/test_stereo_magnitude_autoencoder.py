from __future__ import annotations

import math

import pytest
import torch

from models.magnitude_autoencoder import MagnitudeAE
from models.stereo_magnitude_autoencoder import StereoMagnitudeAE
from trainer.evaluate.stereo_figures import stereo_errors

RATE = 48_000


def noises(samples: int = RATE) -> torch.Tensor:
    """Two unrelated noises, (2, samples)."""
    return 0.07 * torch.randn(2, samples, generator=torch.Generator().manual_seed(0))


def voice(samples: int = RATE) -> torch.Tensor:
    time = torch.arange(samples) / RATE
    return sum(0.05 * torch.sin(2 * math.pi * 220 * k * time) / k for k in range(1, 12))


def panned(sound_S: torch.Tensor, degrees: float) -> torch.Tensor:
    angle = torch.tensor(math.radians(degrees))
    return torch.stack((angle.cos() * sound_S, angle.sin() * sound_S))


def again(audio_2S: torch.Tensor) -> torch.Tensor:
    ae = StereoMagnitudeAE()
    return ae.decode(ae.encode(audio_2S[None]))[0, :, : audio_2S.shape[1]]


def correlation(audio_2S: torch.Tensor) -> float:
    left_S, right_S = audio_2S
    return float((left_S * right_S).sum() / (left_S.square().sum() * right_S.square().sum()).sqrt())


def test_identity_is_pinned():
    """Shards on disks depend on it: whoever changes the formula raises the version in the config, and this with it."""
    assert StereoMagnitudeAE().identity() == "9e82c2ebd69f"
    assert StereoMagnitudeAE().identity() != MagnitudeAE().identity()


@pytest.mark.parametrize("samples", [1, 479, 480, 481, 24_000])
def test_shapes_of_any_length(samples):
    ae = StereoMagnitudeAE()
    x0_BCT = ae.encode(noises(samples)[None])
    assert x0_BCT.shape == (1, 256, ae.frames(samples))
    assert ae.decode(x0_BCT).shape == (1, 2, (ae.frames(samples) - 1) * 480)
    assert ae.decode(x0_BCT).isfinite().all()
    with pytest.raises(ValueError, match=r"takes \(batch, 2, samples\)"):
        ae.encode(noises(samples)[None, :1])


def test_the_energies_are_those_of_mono_and_the_middle_is_the_middle():
    sound_S = noises()[0]
    ae, x0_CT = StereoMagnitudeAE(), StereoMagnitudeAE().encode(sound_S.expand(2, -1)[None])[0]
    torch.testing.assert_close(x0_CT[:128], MagnitudeAE().encode(sound_S[None, None])[0])
    torch.testing.assert_close(x0_CT[128:192], torch.zeros(64, x0_CT.shape[1]))
    correlation_PT = x0_CT[192:] * ae.correlation_spread + ae.correlation_mean
    torch.testing.assert_close(correlation_PT, torch.ones(64, x0_CT.shape[1]))


@pytest.mark.parametrize("degrees", [0, 20, 45, 70, 90, 135])
@pytest.mark.parametrize("sound_S", [noises()[0], voice()], ids=["noise", "voice"])
def test_a_sound_stays_at_its_place(sound_S, degrees):
    """At 135 degrees, both channels are as loud, and in opposite phases."""
    audio_2S = panned(sound_S, degrees)
    decoded_2S = again(audio_2S)
    levels = [10 * audio.square().mean(1).clamp(min=1e-9).log10() for audio in (audio_2S, decoded_2S)]
    louder = int(levels[0].argmax())
    assert float(levels[1][louder]) == pytest.approx(float(levels[0][louder]), abs=1)
    difference, found = (float((level[0] - level[1]).clamp(-20, 20)) for level in levels)
    assert found == pytest.approx(difference, abs=1)
    if 0 < degrees < 90 or degrees > 90:
        assert correlation(decoded_2S) == pytest.approx(1 if degrees < 90 else -1, abs=0.02)


def test_a_diffuse_sound_stays_diffuse():
    assert abs(correlation(again(noises()))) < 0.1
    half_2S = noises() + panned(noises(2 * RATE)[0, RATE:], 45) * 2**0.5
    assert correlation(again(half_2S)) == pytest.approx(correlation(half_2S), abs=0.1)


def test_a_band_that_is_at_no_place_is_decoded_to_unrelated_channels():
    """A single frame of any sound is nearly at a place, but D may predict what lies between the places."""
    ae = StereoMagnitudeAE()
    x0_BCT = ae.encode(noises()[None])
    x0_BCT[:, 128:192] = 0
    x0_BCT[:, 192:] = -ae.correlation_mean / ae.correlation_spread
    decoded_2S = ae.decode(x0_BCT)[0]
    assert abs(correlation(decoded_2S)) < 0.05
    levels_db = 10 * decoded_2S.square().mean(1).log10()
    assert float(levels_db[0] - levels_db[1]) == pytest.approx(0, abs=0.5)


def test_the_image_is_kept_where_mid_and_side_by_themselves_lose_it():
    audio_2S = panned(voice(), 20) + panned(noises()[0], 80)
    mono = MagnitudeAE()
    mid, side = ((audio_2S[:1] + sign * audio_2S[1:]) / 2 for sign in (1, -1))
    mid, side = (mono.decode(mono.encode(row[None]))[0, :, :RATE] for row in (mid, side))
    kept, lost = (
        stereo_errors(audio_2S, decoded, RATE) for decoded in (again(audio_2S), torch.cat([mid + side, mid - side]))
    )
    assert kept["level"] < lost["level"] / 2


def test_silence_stays_silent():
    x0_BCT = StereoMagnitudeAE().encode(torch.zeros(1, 2, 4800))
    assert x0_BCT.isfinite().all()
    assert StereoMagnitudeAE().decode(x0_BCT).abs().max() < 1e-4


def test_a_gain_changes_the_energies_alone():
    ae, gain_db_B = StereoMagnitudeAE(), torch.tensor([-9.0])
    audio_2S = panned(voice(), 20) + 0.3 * noises()
    x0_BCT = ae.encode(audio_2S[None])
    expected_BCT = ae.encode(audio_2S[None] * 10 ** (-9 / 20))
    torch.testing.assert_close(ae.at_gain(x0_BCT, gain_db_B), expected_BCT, atol=2e-2, rtol=0)


def test_long_sounds_are_decoded_in_blocks_without_a_seam(monkeypatch):
    audio_2S = panned(voice(), 20) + noises()
    whole_2S = again(audio_2S)
    monkeypatch.setattr("models.autoencoder.FRAMES_PER_BLOCK", 16)
    torch.testing.assert_close(again(audio_2S), whole_2S, atol=2e-4, rtol=0)


def test_numbers_that_no_sound_has_decode_to_something_finite():
    """D may predict them."""
    x0_BCT = 30 * torch.randn(1, 256, 20, generator=torch.Generator().manual_seed(1))
    assert StereoMagnitudeAE().decode(x0_BCT).isfinite().all()
