"""One run, handed from one strategy and world size to the next, listening and measuring on its way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import rank_processes
from tests.trainer.test_loop import losses, stop_after
from trainer.log.metrics import read_metrics
from trainer.loop import train
from trainer.recipes.reading import load_recipe

LENGTH = ("autoencode.samples=96", "log.every=8", "log.samples_every=40", "checkpoint.every=32", "sampling.steps=2")
SETTINGS = ("pretrain.samples=64", *LENGTH, "parallel.threads=1", "parallel.device=cpu")
ALL = 10**6


def work(rank: int, run_dir: str, prepared: str, stage: str, steps: int, *overrides: str) -> None:
    paths = [f"run_dir={run_dir}", f"data.latents={prepared}/latents", f"data.audio={prepared}/audio"]
    train(load_recipe("tiny", [*paths, *SETTINGS, *overrides]), stage, stop=stop_after(steps))


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory) -> Path:
    """A run under DDP on one rank that nothing interrupted."""
    run = tmp_path_factory.mktemp("straight")
    for stage in ("pretrain", "autoencode"):
        assert rank_processes.run(work, 1, str(run), str(prepared), stage, ALL) == [0]
    return run


def held_out(run: Path) -> dict[int, float]:
    lines = read_metrics(run / "autoencode/metrics.jsonl")
    return {line["samples"]: line["loss"] for line in lines if line["kind"] == "held_out"}


def test_handed_on_it_stays_one_curve(straight, prepared, tmp_path):
    run = tmp_path / "run"
    assert rank_processes.run(work, 1, str(run), str(prepared), "pretrain", ALL) == [0]
    for strategy, world_size, steps, more in (
        ("zero3", 2, 3, ()),
        ("fsdp2", 2, 3, ("parallel.micro_batch=2", "parallel.shard_base=true")),
        ("zero1", 1, 2, ("parallel.checkpoint_activations=true",)),
        ("zero2", 2, ALL, ("parallel.offload=optimizer",)),
    ):
        overrides = (f"parallel.strategy={strategy}", *more)
        assert (
            rank_processes.run(work, world_size, str(run), str(prepared), "autoencode", steps, *overrides)
            == [0] * world_size
        )
    ours, theirs = losses(run, "autoencode"), losses(straight, "autoencode")
    assert ours.keys() == theirs.keys()
    assert [ours[samples] for samples in theirs] == pytest.approx(list(theirs.values()), rel=1e-5)
    log = (run / "autoencode/logs/rank_0.log").read_text()
    for handed_on in (
        "written by zero3 on 2 ranks, now fsdp2 on 2 ranks",
        "written by fsdp2 on 2 ranks, now zero1 on 1 rank",
        "written by zero1 on 1 rank, now zero2 on 2 ranks",
    ):
        assert handed_on in log
    assert sorted(held_out(run)) == [32, 64, 96]  # at 64 it had to leave, and made up for it
    for samples, loss in held_out(run).items():
        assert loss == pytest.approx(held_out(straight)[samples], rel=1e-5)
    for file in ("adapter_model.safetensors", "latent_encoder.safetensors", "upsampler.safetensors"):
        one, other = (load_file(str(path / "autoencode/export" / file)) for path in (run, straight))
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.allclose(value, other[name], rtol=1e-3, atol=1e-6), name
    assert list((run / "autoencode/samples").glob("step_*/*decoded.flac"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_and_resumes(prepared, straight, tmp_path, precision):
    """Handed from FSDP2 to DDP; the loss scale of fp16 goes along."""
    run = tmp_path / "run"
    assert rank_processes.run(work, 1, str(run), str(prepared), "pretrain", ALL) == [0]
    for strategy, steps in (("fsdp2", 4), ("ddp", ALL)):
        overrides = (f"parallel.precision={precision}", f"parallel.strategy={strategy}")
        assert rank_processes.run(work, 2, str(run), str(prepared), "autoencode", steps, *overrides) == [0, 0]
    ours, theirs = losses(run, "autoencode"), losses(straight, "autoencode")
    assert [ours[samples] for samples in theirs] == pytest.approx(list(theirs.values()), rel=3e-2)
