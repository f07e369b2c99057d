from __future__ import annotations

import pytest
import torch

from trainer.evaluate.stereo_figures import LOUDEST_DIFFERENCE_DB, stereo_errors

RATE = 48_000


def noises(count: int = 2) -> torch.Tensor:
    return 0.1 * torch.randn(count, RATE, generator=torch.Generator().manual_seed(0))


def test_a_sound_itself_has_no_error_at_any_gain():
    audio_2S = noises()
    for gain in (1.0, 0.1):
        errors = stereo_errors(audio_2S, gain * audio_2S, RATE)
        assert errors == {"level": pytest.approx(0, abs=1e-3), "coherence": pytest.approx(0, abs=1e-4)}


def test_a_channel_that_is_6_db_quieter_is_an_error_of_6_db_and_none_of_coherence():
    audio_2S = noises()
    errors = stereo_errors(audio_2S, audio_2S * torch.tensor([[1.0], [0.5]]), RATE)
    assert errors["level"] == pytest.approx(6.02, abs=0.02)
    assert errors["coherence"] == pytest.approx(0, abs=1e-3)


def test_unrelated_channels_that_become_equal_have_an_error_of_coherence_alone():
    one_S = noises(1)
    errors = stereo_errors(noises(), one_S.expand(2, -1), RATE)
    assert errors["coherence"] == pytest.approx(1, abs=0.15)
    opposite = stereo_errors(one_S.expand(2, -1), torch.cat([one_S, -one_S]), RATE)
    assert opposite["coherence"] == pytest.approx(2, abs=0.01)
    assert opposite["level"] == pytest.approx(0, abs=0.01)


def test_a_sound_on_one_side_that_becomes_mono_is_as_wrong_as_can_be():
    one_S = noises(1)
    left_2S = torch.cat([one_S, torch.zeros_like(one_S)])
    errors = stereo_errors(left_2S, one_S.expand(2, -1), RATE)
    assert errors["level"] == pytest.approx(LOUDEST_DIFFERENCE_DB, abs=0.01)


def test_what_is_60_db_below_the_loudest_does_not_count():
    audio_2S = noises()
    audio_2S[:, RATE // 2 :] *= 1e-4
    turned_2S = audio_2S.clone()
    turned_2S[:, RATE // 2 + 4096 :] = audio_2S[:, RATE // 2 + 4096 :].flip(0) * torch.tensor([[1.0], [0.0]])
    assert stereo_errors(audio_2S, turned_2S, RATE)["level"] == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("shape", [(1, RATE), (2, RATE - 1), (3, RATE)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"must both be \(2, samples\)"):
        stereo_errors(noises(), torch.zeros(shape), RATE)
