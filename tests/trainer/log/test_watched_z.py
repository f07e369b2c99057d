"""What the log says of z at each checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import pipeline
from models.codec import SPresso
from tests.trainer import rank_processes
from trainer.effective_rank import covariance, effective_rank
from trainer.log.held_out import held_out_latents
from trainer.log.metrics import read_metrics
from trainer.loop import train
from trainer.recipes.reading import load_recipe

SHORT = ("pretrain.samples=8", "autoencode.samples=16", "finetune.samples=16", "checkpoint.every=8")


@pytest.fixture(scope="module")
def run_dir(prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "run"
    config = load_recipe("tiny", overrides(folder, prepared))
    for stage in ("pretrain", "autoencode", "quantize", "finetune"):
        assert pipeline.run_stage(config, stage) == "done"
    return folder


def overrides(run_dir: Path | str, prepared: Path | str) -> list[str]:
    paths = [f"run_dir={run_dir}", f"data.latents={prepared}/latents", f"data.audio={prepared}/audio"]
    return [*paths, *SHORT, "parallel.threads=1", "parallel.device=cpu"]


def held_out(run_dir: Path, stage: str) -> list[dict]:
    return [line for line in read_metrics(run_dir / stage / "metrics.jsonl") if line["kind"] == "held_out"]


def vectors(run_dir: Path, prepared: Path, codec: SPresso) -> torch.Tensor:
    config = load_recipe("tiny", overrides(run_dir, prepared))
    _, x0_BCT = held_out_latents(config, config.stage("autoencode"), config.log.held_out)
    with torch.inference_mode():
        return codec.g(x0_BCT).transpose(1, 2).flatten(0, 1)


def test_each_checkpoint_says_in_how_many_directions_z_lies(run_dir, prepared):
    lines = held_out(run_dir, "autoencode")
    assert [line["samples"] for line in lines] == [8, 16]
    assert not any("z_error" in line for line in lines)  # there are no codes yet
    z = vectors(run_dir, prepared, SPresso.from_pretrained(run_dir / "autoencode/export"))
    assert lines[-1]["z_rank"] == effective_rank(covariance(z))
    assert 1 <= lines[-1]["z_rank"] <= 16
    assert not any("z_rank" in line for line in held_out(run_dir, "pretrain"))


def test_each_prefix_of_the_codes_has_its_error(run_dir, prepared):
    lines = held_out(run_dir, "finetune")
    assert [line["samples"] for line in lines] == [8, 16]
    codec = SPresso.from_pretrained(run_dir / "finetune/export")
    z = vectors(run_dir, prepared, codec)
    with torch.inference_mode():
        codes = codec.quantizer.encode(z)
        decoded = [codec.quantizer.decode(codes[:, :books]) for books in (1, 2, 3, 4)]
    spread = (z - z.mean(0)).square().mean()
    expected = {f"{5 * m}_bits": ((z_q - z).square().mean() / spread).item() for m, z_q in enumerate(decoded, start=1)}
    for line in lines:
        assert line["z_error"] == pytest.approx(expected, rel=1e-4)


def test_the_errors_are_curves_of_one_group(run_dir):
    board = EventAccumulator(str(run_dir / "finetune/tensorboard")).Reload()
    found = {tag for tag in board.Tags()["scalars"] if tag.startswith("held_out")}
    assert found == {"held_out/loss", "held_out/z_rank", *(f"held_out_z_error/{bits}_bits" for bits in (5, 10, 15, 20))}


def again(rank: int, run_dir: str, prepared: str) -> None:
    config = load_recipe("tiny", [*overrides(run_dir, prepared), "parallel.processes=2", "log.held_out=7"])
    assert train(config, "finetune") == "done"


def test_two_ranks_say_the_same_as_one(run_dir, prepared, tmp_path):
    for name, ranks in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        for stage in ("pretrain", "autoencode", "quantize"):
            (tmp_path / name / stage).symlink_to(run_dir / stage)
        if ranks == 1:
            assert train(load_recipe("tiny", [*overrides(tmp_path / name, prepared), "log.held_out=7"]), "finetune")
        else:
            assert rank_processes.run(again, ranks, str(tmp_path / name), str(prepared)) == [0] * ranks
    one, two = (held_out(tmp_path / name, "finetune") for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for expected, found in zip(one, two, strict=True):
        assert found["z_rank"] == expected["z_rank"]
        assert found["z_error"] == pytest.approx(expected["z_error"], rel=1e-5)
