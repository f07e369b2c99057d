"""The denoising error of the evaluation; the rest of it is tested with the stages that it stands on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch import pipeline
from models.codec import SPresso
from trainer import evaluate
from trainer.config import Config
from trainer.evaluate import LEVELS, NOISE_SEED, load_clips


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluated") / "run"


@pytest.fixture
def trained(tiny, run_dir) -> Config:
    config = tiny("pretrain.samples=64", "autoencode.samples=64", "finetune.samples=32", run_dir=run_dir)
    for stage in ("pretrain", "autoencode", "quantize", "finetune"):
        assert pipeline.run_stage(config, stage) == "done"
    return config


def test_the_denoising_error_is_that_of_training(trained, run_dir):
    report = evaluate.evaluate(trained)
    found = {key: results.get("denoising") for key, results in report["results"].items()}
    assert found.pop("autoencoder") is None  # it denoises nothing
    assert set(found) == {"z", "zq4", "zq2", "zq4_before", "zq2_before", "z_other", "unconditional"}
    assert all(len(of_system["clips"]) == trained.evaluate.clips for of_system in found.values())

    codec = SPresso.from_pretrained(run_dir / "autoencode/export")
    clips = load_clips(trained, torch.device("cpu"))
    with torch.inference_mode():
        x0 = codec.autoencoder.encode(clips.audio_B1S)[..., :63]  # one window; the clip has 101 frames
        z = codec.audio_to_z(clips.audio_B1S)[..., :7]
        noise = codec.noise([NOISE_SEED + n for n in range(len(x0))], 7)
        expected = torch.zeros(len(x0))
        for level in range(LEVELS):
            t = codec.diffusion.noise_level(torch.full((len(x0),), (level + 0.5) / LEVELS))
            x_t = codec.diffusion.corrupt(x0, noise.roll(level, -1), t)
            predicted = codec.diffusion.predict(lambda x, t: codec.dit(x, t, condition=codec.f(z)), x_t, t)
            error = predicted - codec.diffusion.target(x0, noise.roll(level, -1), t)
            expected += error.square().mean((1, 2)) / LEVELS
    torch.testing.assert_close(torch.tensor(found["z"]["clips"]), expected, rtol=1e-4, atol=1e-5)


def test_the_table_shows_it_with_its_digits(trained, run_dir):
    report = evaluate.evaluate(trained)
    table = evaluate.table(report)
    assert f"{report['results']['z']['denoising']['mean']:.4f}" in table
    assert json.loads((run_dir / "evaluate/evaluation.json").read_text())["results"] == report["results"]
