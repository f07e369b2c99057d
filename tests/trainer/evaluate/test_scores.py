"""What the figures of an evaluation stand on: the embeddings, ViSQOL, and their names."""

from __future__ import annotations

import pytest
import torch

from tests.system_packages import COMPILER, require
from trainer.evaluate.embeddings import Clap, make_embedding
from trainer.evaluate.figures import mel_statistics
from trainer.evaluate.scores import Scorer, figures_of
from trainer.evaluate.systems import System
from trainer.evaluate.under_test import Decoded

CPU = torch.device("cpu")


def sounds(count: int, seconds: float = 0.6, rate: int = 48_000) -> torch.Tensor:
    return 0.1 * torch.randn(count, 1, round(seconds * rate), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clap(tmp_path_factory) -> str:
    """A tiny random CLAP, saved as the real one is."""
    from transformers import ClapAudioConfig, ClapConfig, ClapFeatureExtractor, ClapModel, ClapTextConfig

    torch.manual_seed(0)
    audio = ClapAudioConfig(
        spec_size=64, num_mel_bins=16, patch_embeds_hidden_size=8, depths=[1, 1], num_attention_heads=[1, 2],
        hidden_size=16, window_size=4, patch_size=4, patch_stride=[4, 4], projection_dim=12, enable_fusion=False,
    )  # fmt: skip
    text = ClapTextConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    folder = tmp_path_factory.mktemp("weights") / "clap-tiny"
    ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=12)).save_pretrained(
        folder
    )
    ClapFeatureExtractor(feature_size=16, max_length_s=2, truncation="rand_trunc").save_pretrained(folder)
    return str(folder)


def test_clap_hears_48_khz_in_windows_and_is_named(clap):
    embedding = make_embedding(f"clap:{clap}", CPU)
    assert isinstance(embedding, Clap)
    with torch.inference_mode():
        short = embedding(sounds(1)[0], 48_000)
        assert short.shape == (1, 12)
        torch.testing.assert_close(short.norm(dim=-1), torch.ones(1))
        assert embedding(sounds(1, seconds=4.5)[0], 48_000).shape == (3, 12)
        at_half = embedding(sounds(1, rate=24_000)[0], 24_000)
        assert at_half.shape == (1, 12)
    figures = {figure.key: figure for figure in figures_of(embedding, clips=24, visqol=False)}
    for key in ("frechet", "kernel", "retrieval"):
        assert figures[key].title.endswith("(CLAP clap-tiny)")
        assert "CLAP clap-tiny" in figures[key].note
        assert "mel" not in figures[key].note
    assert {key: figure.chance for key, figure in figures.items() if figure.chance} == {"retrieval": 100 / 24}


def test_clap_that_is_nowhere_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"evaluate\.embedding=clap:.*can't be loaded .*or leave the key out"):
        make_embedding(f"clap:{tmp_path}", CPU)(sounds(1)[0], 48_000)


def test_mel_statistics_need_nothing():
    embedding = make_embedding("mel-stat", CPU)
    clips = sounds(2)
    rows, windows = Scorer(embedding, 48_000, visqol=False).embed(clips)
    assert windows == [1, 1]
    torch.testing.assert_close(rows, mel_statistics(clips[:, 0], 48_000))
    titles = [figure.title for figure in figures_of(embedding, clips=2, visqol=True)]
    assert "Kernel distance (mel-stat)" in titles
    assert titles[-1] == "ViSQOL"


def test_visqol_hears_more_noise_and_a_clip_that_failed_has_no_figure():
    require(*COMPILER)  # `make install` leaves ViSQOL out where its libsvm cannot be compiled
    clips = sounds(2, seconds=1.2)
    noisy = clips + 0.3 * sounds(4, seconds=1.2)[2:]
    made = Decoded(System("s", "s", "system"), [noisy], failures={1: "no"})
    scorer = Scorer(make_embedding("mel-stat", CPU), 48_000, visqol=True)
    found = scorer.figures(clips, made, [0, 1])
    assert all(values[1].isnan() for values in found.values())
    same = scorer.figures(clips[:1], Decoded(made.system, [clips[:1]]), [0])
    assert 1 <= found["visqol"][0] < same["visqol"][0] <= 5
