from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from trainer.evaluate.other_codecs import Other
from trainer.evaluate.scores import Scorer


class Halver:
    """A codec that halves a channel, for 100 bits."""

    spec, weights, title, kbps, licence, fetches = "halver@0.3", None, "Halver", 0.3, "none", False

    def missing(self) -> str:
        return ""

    def load(self, device: torch.device) -> None:
        pass

    def code(self, audio_S: np.ndarray, sample_rate: int) -> tuple[np.ndarray, int]:
        assert audio_S.ndim == 1
        return audio_S / 2, 100


def test_stereo_is_coded_channel_by_channel_and_costs_as_much():
    audio_BCS = torch.randn(2, 2, 500)
    clips = SimpleNamespace(channels=2, sample_rate=48_000, keys=["a", "b"], audio=lambda rows: audio_BCS)
    made = Other(Halver(), clips, torch.device("cpu")).decode([0, 1])
    assert torch.equal(made.takes[0], audio_BCS / 2)
    assert made.payload_bits == [200, 200]
    assert (made.system.title, made.system.table) == ("Halver, 0.6 kbps", "low")
    assert "Each of the 2 channels" in made.system.note
    clips.channels = 1
    assert Other(Halver(), clips, torch.device("cpu")).decode([0]).system.title == "Halver, 0.3 kbps"


def test_figures_of_stereo_are_means_over_the_channels_that_sound():
    class Embedding:
        def __call__(self, audio_1S: torch.Tensor, sample_rate: int) -> torch.Tensor:
            return audio_1S.mean(-1, keepdim=True)

    scorer = Scorer(Embedding(), 48_000, visqol=False)
    original_2S = 0.1 * torch.randn(2, 48_000)
    decoded_2S = original_2S * torch.tensor([[1.0], [0.5]])
    both = scorer._of_clip(original_2S, decoded_2S)["log_mel"]
    right = scorer._of_clip(original_2S[1:], decoded_2S[1:])["log_mel"]
    assert right > 1
    torch.testing.assert_close(both, right / 2)
    silent_2S = original_2S * torch.tensor([[0.0], [1.0]])
    assert scorer._of_clip(silent_2S, decoded_2S)["log_mel"] == right
    rows, _ = scorer.embed(original_2S[None])
    torch.testing.assert_close(rows, original_2S.mean().reshape(1, 1))
