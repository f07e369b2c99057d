"""The evaluation of a tiny run: its figures and controls, in one process and in parts, beside codecs by others."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from launch import pipeline
from models.codec import SPresso
from models.sizes import Sampling
from tests.trainer.tiny_codecs import save_tiny_codecs
from trainer.evaluate import evaluation, tables
from trainer.evaluate.baselines import DAC, Opus
from trainer.evaluate.embeddings import Aisfx
from trainer.evaluate.figures import kernel_distance, log_mel_distance, mel_statistics, retrieval
from trainer.evaluate.own_codecs import LEVELS, NOISE_SEED
from trainer.evaluate.pieces import Pieces
from trainer.evaluate.scored_clips import load_clips
from trainer.page.recordings import require_recordings
from trainer.recipes.schema import Config


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
    report = evaluation.evaluate(trained)
    found = {key: results.get("denoising") for key, results in report["results"].items()}
    assert found.pop("autoencoder") is None  # it denoises nothing
    assert set(found) == {"z", "zq4", "zq2", "zq4_before", "zq2_before", "z_other", "unconditional"}
    assert all(len(of_system["clips"]) == trained.evaluate.clips for of_system in found.values())

    codec = SPresso.from_pretrained(run_dir / "autoencode/export")
    clips = load_clips(trained, torch.device("cpu"))
    with torch.inference_mode():
        x0 = codec.autoencoder.encode(clips.audio_BCS)[..., :63]  # one window; the clip has 101 frames
        z = codec.audio_to_z(clips.audio_BCS)[..., :7]
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
    report = evaluation.evaluate(trained)
    table = tables.table(report)
    assert f"{report['results']['z']['denoising']['mean']:.4f}" in table
    assert json.loads((run_dir / "evaluate/evaluation.json").read_text())["results"] == report["results"]


def test_beside_each_figure_stands_that_of_another_clips_codes(trained, run_dir):
    results = evaluation.evaluate(trained)["results"]
    assert results["z"]["log_mel"]["control"] == results["z_other"]["log_mel"]["mean"]
    codec = SPresso.from_pretrained(run_dir / "finetune/export")
    audio = load_clips(trained, torch.device("cpu")).audio_BCS
    with torch.inference_mode():
        codes = [torch.from_numpy(codec.encode(clip, books=2).codes)[0] for clip in audio]
        z = codec.quantizer.decode(torch.stack(codes)).transpose(1, 2)
        noise = codec.noise(list(range(len(audio))), z.shape[-1])
        for name, told in (("mean", z), ("control", z.roll(-1, 0))):
            decoded = codec.z_to_audio(told, noise, sampling=Sampling(steps=4))[..., : audio.shape[-1]]
            expected = log_mel_distance(audio[:, 0], decoded[:, 0], 48_000).mean()
            assert results["zq2"]["log_mel"][name] == pytest.approx(expected.item(), rel=1e-4)
            embedded = [torch.cat([mel_statistics(clip[0], 48_000) for clip in set_]) for set_ in (audio, decoded)]
            assert results["zq2"]["kernel"][name] == pytest.approx(kernel_distance(*embedded), rel=1e-3)
            means = [
                torch.stack([mel_statistics(clip[0], 48_000).mean(0) for clip in set_]) for set_ in (audio, decoded)
            ]
            found = retrieval(*means, torch.arange(len(audio)))
            assert results["zq2"]["retrieval"][name] == pytest.approx(found.mean().item())
            assert name == "control" or results["zq2"]["retrieval"]["clips"] == found.tolist()
    ours = ("z", "zq4", "zq2", "zq4_before", "zq2_before")
    assert all("control" in results[key][figure] for key in ours for figure in ("si_sdr", "denoising", "frechet"))
    assert not any(key.endswith("_other") for key in results if key != "z_other")
    assert results["autoencoder"]["retrieval"]["mean"] > results["z_other"]["retrieval"]["mean"]


def test_the_spread_is_that_of_the_decodes_that_are_kept(trained, run_dir):
    report = evaluation.evaluate(trained)
    assert report["variability"]["systems"] == ["z", "zq4", "zq2"]
    for key in ("z", "zq2"):
        spreads = []
        for clip in report["clips"]:
            files = clip["audio"][key]
            takes = [torch.from_numpy(soundfile.read(run_dir / "evaluate" / file)[0]).float() for file in files]
            assert len(takes) == trained.evaluate.decodes
            pairs = itertools.permutations(takes, 2)
            spreads.append(np.mean([log_mel_distance(one, other, 48_000) for one, other in pairs]))
        assert report["results"][key]["spread"]["clips"] == pytest.approx(spreads, rel=1e-2)


def test_each_system_has_its_table_and_interval(trained):
    report = evaluation.evaluate(trained)
    tables = {system["key"]: system["table"] for system in report["systems"]}
    assert tables == {
        "original": "", "autoencoder": "", "z": "continuous", "zq4": "ultra_low", "zq2": "ultra_low",
        "zq4_before": "ultra_low", "zq2_before": "ultra_low", "z_other": "", "unconditional": "",
    }  # fmt: skip
    for scores in report["results"].values():
        for key, score in scores.items():
            if key != "kernel":  # which is centred on other pairs
                assert score["ci"][0] <= score["mean"] <= score["ci"][1]
    best = [key for key in tables if report["results"].get(key, {}).get("log_mel", {}).get("best")]
    assert len(best) == 1
    against = [report["results"][key]["log_mel"] for key in tables if tables[key] == "ultra_low" and key not in best]
    for score in against:
        low, high = score["difference_ci"]
        assert score["significant"] == (low > 0 or high < 0)
        assert score["difference"] == pytest.approx(score["mean"] - report["results"][best[0]]["log_mel"]["mean"])


def test_what_was_removed_of_an_evaluation_is_made_again(trained, run_dir):
    """The report, as the message on a damaged one says to, and a recording."""
    whole, folder = evaluation.evaluate(trained), run_dir / "evaluate"
    (folder / "evaluation.json").unlink()
    assert lasting(evaluation.evaluate(trained)) == lasting(whole)
    pipeline.page(trained)
    page = {path for path in (run_dir / "page").rglob("*") if path.is_file()}
    recording = folder / whole["clips"][0]["audio"]["zq2"][1]
    content = recording.read_bytes()
    recording.unlink()
    with pytest.raises(ValueError, match="is missing: `spresso evaluate` makes it again"):
        require_recordings(whole, folder)
    assert lasting(evaluation.evaluate(trained)) == lasting(whole)
    assert recording.read_bytes() == content
    pipeline.page(trained)
    assert {path for path in (run_dir / "page").rglob("*") if path.is_file()} == page


# ---- in parts


def small(trained: Config, *, batch: int = 1, **more: object) -> Config:
    """Three clips, a block each."""
    trained.evaluate.clips, trained.evaluate.page_clips, trained.evaluate.batch = 3, 2, batch
    for key, value in more.items():
        setattr(trained.evaluate, key, value)
    return trained


def lasting(report: dict) -> dict:
    return {key: value for key, value in report.items() if key not in ("speed", "created")}


def made(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("pieces/*/*.safetensors")}


def test_parts_make_the_same_report_whatever_was_killed(trained, run_dir, monkeypatch):
    config = small(trained)
    folder = run_dir / "evaluate"
    whole = evaluation.evaluate(config)
    sounds = {path: path.read_bytes() for path in folder.rglob("*.flac")}
    for index, clip in enumerate(whole["clips"]):  # each is in a block of its own
        pair = [soundfile.read(folder / clip["audio"][key][0])[0] for key in ("original", "autoencoder")]
        expected = log_mel_distance(*map(torch.from_numpy, pair), 48_000).item()
        assert whole["results"]["autoencoder"]["log_mel"]["clips"][index] == pytest.approx(expected, rel=1e-2)
    pieces = len(made(folder))
    shutil.rmtree(folder)

    write, left = Pieces.write, iter(range(10))

    def killed(*arguments: object) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(Pieces, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate_part(config, part=0, parts=2)
    monkeypatch.setattr(Pieces, "write", write)
    before = made(folder)
    assert len(before) == 10
    assert evaluation.evaluate_part(config, part=1, parts=2) is None
    assert not (folder / "evaluation.json").exists()
    merged = evaluation.evaluate_part(config, part=0, parts=2)
    assert lasting(merged) == lasting(whole)
    assert json.dumps(lasting(json.loads((folder / "evaluation.json").read_text()))) == json.dumps(lasting(whole))
    assert {path: path.read_bytes() for path in folder.rglob("*.flac")} == sounds
    after = made(folder)
    assert len(after) == pieces
    assert {path: after[path] for path in before} == before
    assert evaluation.evaluate_part(config, part=1, parts=2) == merged
    assert made(folder) == after
    with pytest.raises(ValueError, match="has the parts 0 to 1, not 2"):
        evaluation.evaluate_part(config, part=2, parts=2)


# ---- beside others


def test_codecs_by_others_cost_their_own_decodes_alone_and_end_nothing(trained, run_dir, tmp_path, monkeypatch):
    folder, weights = run_dir / "evaluate", save_tiny_codecs(tmp_path / "weights")
    config = small(trained, batch=2)
    ours = evaluation.evaluate(config)
    before = {path: at for path, at in made(folder).items() if not path.parent.name.startswith("z-")}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, calls = Opus.code, iter(range(100))

    def moody(self: Opus, audio: np.ndarray, rate: int) -> tuple[np.ndarray, int | None]:
        if next(calls) == 1:
            raise RuntimeError("a third party's\nown trouble")
        return code(self, audio, rate)

    monkeypatch.setattr(Opus, "code", moody)
    dac = tmp_path / "dac"
    config = small(
        trained, batch=2, baselines=["opus@6", "dac@1.7", "semanticodec@0.31", "stable_audio"],
        weights={"dac": str(dac), "stable_audio": weights["stable_audio"]},
        codecs={"Again 1": str(run_dir / "finetune/export")},
    )  # fmt: skip
    report = evaluation.evaluate(config)
    after = made(folder)
    assert {path: after[path] for path in before} == before  # z is decoded again: once, as others vary more
    systems = {system["key"]: system for system in report["systems"]}

    opus = report["results"]["opus_6"]["log_mel"]["clips"]
    assert [value is None for value in opus] == [False, True, False]
    assert [value is None for value in report["results"]["opus_6"]["retrieval"]["clips"]] == [False, True, False]
    assert report["results"]["opus_6"]["log_mel"]["mean"] == pytest.approx(np.mean([opus[0], opus[2]]))
    assert "Failed on 1 of 3 clips: RuntimeError: a third party's own trouble" in systems["opus_6"]["note"]
    assert systems["opus_6"]["payload_kbps"] == pytest.approx(6, rel=0.5)
    assert (systems["opus_6"]["role"], systems["opus_6"]["table"]) == ("baseline", "low")
    assert "opus_6" not in report["clips"][1]["audio"]
    assert systems["stable_audio"]["table"] == "continuous"
    assert "Stability AI" in systems["stable_audio"]["licence"]
    assert report["results"]["stable_audio"]["log_mel"]["mean"] > 0
    for key in ("dac_1.7", "semanticodec_0.31"):
        assert systems[key]["unavailable"]
        assert key not in report["results"]
    assert systems["semanticodec_0.31"]["table"] == "ultra_low"

    for ours_, theirs in (("z", "again_1_z"), ("zq4", "again_1_zq4"), ("zq2", "again_1_zq2")):
        assert report["results"][theirs]["log_mel"]["clips"] == report["results"][ours_]["log_mel"]["clips"]
        assert report["results"][theirs]["denoising"]["control"] == report["results"][ours_]["denoising"]["control"]
        assert report["results"][ours_]["log_mel"]["clips"] == ours["results"][ours_]["log_mel"]["clips"]
    assert systems["again_1_zq4"]["title"] == "Again 1, 0.22 kbps"
    assert report["variability"]["systems"] == ["zq4", "zq2", "again_1_zq4", "again_1_zq2"]

    shutil.copytree(weights["dac"], dac)  # now they are here
    filled = evaluation.evaluate(config)
    assert filled["results"]["dac_1.7"]["log_mel"]["mean"] > 0
    assert {path: at for path, at in made(folder).items() if "dac" not in str(path)} == {
        path: at for path, at in after.items() if "dac" not in str(path)
    }
    monkeypatch.setattr(DAC, "load", lambda *_: pytest.fail("done before"))
    assert evaluation.evaluate(config) == filled
    config.evaluate.codecs |= {"again-1": config.evaluate.codecs["Again 1"]}
    with pytest.raises(ValueError, match="differ only in case or punctuation: Again 1, again-1"):
        evaluation.evaluate(config)
    for name in ("txt", "md", "tex"):
        assert "Opus, 6 kbps" in (folder / f"table.{name}").read_text()


def test_pieces_of_another_embedding_are_not_mixed(trained, monkeypatch):
    monkeypatch.setattr(Aisfx, "missing", staticmethod(lambda: ""))
    chosen = ("mel-stat", "aisfx", "clap:a", "clap:b")
    plans = {name: evaluation._Plan(small(trained, embedding=name)) for name in chosen}
    names = [name for plan in plans.values() for name in plan.names.values()]
    assert len(set(names)) == len(names) == 4 * len(plans["aisfx"].names)
    assert len({plan.identity for plan in plans.values()}) == 4
    assert evaluation._Plan(small(trained, embedding="auto")).names == plans["aisfx"].names
    monkeypatch.setattr(Aisfx, "missing", staticmethod(lambda: "it is gone"))
    assert evaluation._Plan(small(trained, embedding="auto")).names == plans["mel-stat"].names


def test_an_export_that_is_none_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="is not an export: give a folder such as runs/NAME/finetune/export"):
        tiny(f"evaluate.codecs={{x: {tmp_path}}}")
    with pytest.raises(ValueError, match=r"the nearest is dac@1\.7"):
        tiny("evaluate.baselines=[dac@2]")
    with pytest.raises(ValueError, match="neither auto, aisfx, mel-stat nor clap:FOLDER_OR_NAME"):
        tiny("evaluate.embedding=clip")


def test_an_evaluation_takes_its_own_number_of_threads(tiny, monkeypatch):
    """A stage that was trained in the same process may have set another one, on which sums depend."""
    threads = []

    class Plan:
        folder = Path("nowhere")

        def __init__(self, config: Config) -> None:
            torch.set_num_threads(3)

        def finished(self) -> None:
            return None

        def work(self, part: int, parts: int) -> None:
            threads.append(torch.get_num_threads())

        def complete(self) -> bool:
            return False

    monkeypatch.setattr(evaluation, "_Plan", Plan)
    before = torch.get_num_threads()
    try:
        evaluation.evaluate_part(tiny("parallel.threads=2"), part=0, parts=2)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        evaluation.evaluate_part(tiny("parallel.threads=null"), part=0, parts=2)
    finally:
        torch.set_num_threads(before)
    assert threads == [2, 1]
