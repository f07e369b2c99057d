import pytest
import torch

from models.loudness import is_silent, level


@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0])
def test_level_reaches_the_target_in_half_decibels(scale):
    audio = torch.sin(torch.arange(4800) * 0.1)[None] * scale
    levelled, gain_db = level(audio)
    assert gain_db % 0.5 == 0
    assert abs(10 * torch.log10(levelled.square().mean()) + 23) <= 0.26
    torch.testing.assert_close(levelled * 10 ** (-gain_db / 20), audio)


def test_peak_bounds_the_gain():
    audio = torch.zeros(1, 48000)
    audio[0, 100] = 0.5
    levelled, gain_db = level(audio)
    assert 0.9 < levelled.max() <= 0.99
    assert gain_db == 5.5


def test_gain_stays_in_what_a_stream_can_hold():
    quiet = torch.sin(torch.arange(48000) * 0.1)[None] * 1.6e-4
    assert not is_silent(quiet)
    assert level(quiet)[1] == 56.0
    assert level(quiet, target_rms_db=0.0, peak=10.0)[1] == 60.0


@pytest.mark.parametrize("audio", [torch.zeros(1, 100), torch.full((2, 50), 0.3), torch.zeros(1, 0), torch.zeros(1, 1)])
def test_silence_and_constants_are_left_alone(audio):
    assert is_silent(audio)
    assert level(audio)[1] == 0.0
