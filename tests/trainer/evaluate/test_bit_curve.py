"""The curve of log-mel against bits a vector: which prefixes it has, and what it says in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch import pipeline
from models.codec import SPresso
from models.sizes import Sampling
from trainer.effective_rank import covariance, effective_rank
from trainer.evaluate import evaluation, tables
from trainer.evaluate.bit_curve import curve_books
from trainer.evaluate.figures import log_mel_distance
from trainer.evaluate.scored_clips import load_clips
from trainer.recipes.schema import Config


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("curve") / "run"


@pytest.fixture
def trained(tiny, run_dir) -> Config:
    config = tiny("pretrain.samples=8", "autoencode.samples=8", "finetune.samples=8", run_dir=run_dir)
    config.evaluate.clips, config.evaluate.page_clips, config.evaluate.batch, config.evaluate.decodes = 3, 2, 2, 1
    for stage in ("pretrain", "autoencode", "quantize", "finetune"):
        assert pipeline.run_stage(config, stage) == "done"
    return config


@pytest.mark.parametrize(
    ("books", "rates", "most", "expected"),
    [
        (4, [4, 2], 12, [1, 2, 3, 4]),
        (12, [12], 12, list(range(1, 13))),
        (60, [60, 25, 8], 8, [1, 2, 3, 8, 10, 25, 32, 60]),
        (60, [60, 50, 40], 2, [1, 40, 50, 60]),  # the recipe's rates are decoded anyhow
        (13, [13], 12, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13]),
    ],
)
def test_which_prefixes_it_has(books, rates, most, expected):
    found = curve_books(books, rates, most=most)
    assert found[0] == 1
    assert found[-1] == books
    assert set(rates) <= set(found)
    assert len(found) == len(expected)
    if most != 8 and books != 13:
        assert found == expected


def test_each_point_is_that_of_the_decodes(trained, run_dir):
    report = evaluation.evaluate(trained)
    curve, results = report["curve"], report["results"]
    assert [(point["books"], point["bits"]) for point in curve["points"]] == [(1, 5), (2, 10), (3, 15), (4, 20)]
    assert curve["clips"] == 2
    codec = SPresso.from_pretrained(run_dir / "finetune/export")
    clips = load_clips(trained, torch.device("cpu"))
    with torch.inference_mode():
        audio = clips.audio([0, 1])
        for point in curve["points"]:
            codes = [torch.from_numpy(codec.encode(clip, books=point["books"]).codes)[0] for clip in audio]
            z = codec.quantizer.decode(torch.stack(codes)).transpose(1, 2)
            decoded = codec.z_to_audio(z, codec.noise([0, 1], z.shape[-1]), sampling=Sampling(steps=4))
            expected = log_mel_distance(audio[:, 0], decoded[:, 0, : audio.shape[-1]], 48_000)
            assert point["clips"] == pytest.approx(expected.tolist(), rel=1e-4)
            assert point["mean"] == pytest.approx(expected.mean().item(), rel=1e-4)
            assert point["ci"][0] <= point["mean"] <= point["ci"][1]
            assert point["kbps"] == pytest.approx(codec.kbps(point["books"]))
        z = codec.audio_to_z(clips.audio_BCS).transpose(1, 2).flatten(0, 1)
    assert (curve["z_rank"], curve["channels"]) == (effective_rank(covariance(z)), 16)
    for key in ("z", "autoencoder", "z_other"):
        assert curve["lines"][key]["clips"] == results[key]["log_mel"]["clips"][:2]
    assert [point["books"] for point in curve["points"] if "control" in point] == [2, 4]
    assert not any("curve" in key or key == "z_vectors" for key in results)
    told = f"99 % of the variance of z lies in {curve['z_rank']} directions of its 16 channels"
    assert told in tables.table(report)
    assert "| 15 | " in tables.markdown(report)


def test_parts_make_the_same_curve(trained, run_dir):
    whole = evaluation.evaluate(trained)["curve"]
    for path in (run_dir / "evaluate").glob("*.*"):  # the report and its tables
        path.unlink()
    probes = [path for path in (run_dir / "evaluate/pieces").glob("*/*.safetensors") if "zq3-" in str(path)]
    assert len(probes) == 2
    for path in probes:
        path.unlink()
    assert evaluation.evaluate_part(trained, part=1, parts=2) is None
    report = evaluation.evaluate_part(trained, part=0, parts=2)
    assert report is not None
    assert report["curve"] == whole


def test_the_setting_decides_and_an_older_report_stays(trained, run_dir):
    path = run_dir / "evaluate/evaluation.json"
    before = evaluation.evaluate(trained)
    trained.evaluate.curve = 0
    assert evaluation.evaluate(trained)["curve"] is None
    trained.evaluate.curve = 12
    assert evaluation.evaluate(trained)["curve"] == before["curve"]
    older = {key: value for key, value in json.loads(path.read_text()).items() if key != "curve"}
    path.write_text(json.dumps(older))
    assert "curve" not in evaluation.evaluate(trained)
    assert "of the variance of z" not in tables.table(older)
