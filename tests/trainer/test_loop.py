"""The loop: exact resume, any cut of the batch, and what a run leaves behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.local import train_here
from trainer.checkpoints import checkpoint
from trainer.log.metrics import read_metrics
from trainer.loop import train
from trainer.recipes.schema import TrainConfig
from trainer.run_directory import RunDirectory
from trainer.schedule import learning_rate
from trainer.stages import trained_stages
from trainer.stop import Stop
from trainer.tasks import CodecTask, frozen_base, make_task

PRETRAIN = ("pretrain.samples=96", "log.every=8", "log.samples_every=0", "checkpoint.every=32")


def losses(run: Path, stage: str = "pretrain") -> dict[int, float]:
    return {
        line["samples"]: line["loss"] for line in read_metrics(run / stage / "metrics.jsonl") if line["kind"] == "train"
    }


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint, whole, read without the trainer: ranges by their offsets."""
    found: dict[str, list[torch.Tensor]] = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, value in load_file(str(file)).items():
            found.setdefault(name, []).append(value)
    return {name: torch.cat(parts) for name, parts in found.items()}


class stop_after(Stop):  # reads as what is asked for
    """Says so from that many steps on; what asks between two steps is told the same, and not counted."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def before_step(self, samples: int) -> None:
        self.left -= 1

    def __call__(self) -> bool:
        return self.left <= 0


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """A run that nothing interrupted."""
    from trainer.recipes.reading import load_recipe

    run_dir = tmp_path_factory.mktemp("whole")
    paths = [f"run_dir={run_dir}", f"data.latents={prepared / 'latents'}", f"data.audio={prepared / 'audio'}"]
    config = load_recipe("tiny", [*paths, "parallel.threads=1", "parallel.device=cpu", *PRETRAIN])
    assert train(config, "pretrain") == "done"
    return run_dir


def test_resume_is_exact_to_the_bit(whole, tiny, tmp_path):
    config = tiny(*PRETRAIN)
    assert train(config, "pretrain", stop=stop_after(5)) == "stopped"
    assert RunDirectory(tmp_path / "run" / "pretrain", "pretrain").status["samples"] == 40
    assert train(config, "pretrain") == "done"
    assert losses(tmp_path / "run") == losses(whole)
    ours, theirs = (tensors(run / "pretrain/checkpoints/step_000000000096") for run in (tmp_path / "run", whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_kill_loses_what_came_after_the_checkpoint_and_nothing_else(whole, tiny, tmp_path):
    """After a kill there are lines of the log beyond the last checkpoint, the last one torn: the curve stays one."""
    config = tiny(*PRETRAIN)
    train(config, "pretrain", stop=stop_after(8))
    stage = tmp_path / "run" / "pretrain"
    shutil.rmtree(stage / "checkpoints/step_000000000064")
    with (stage / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "sam')
    assert train(config, "pretrain") == "done"
    assert losses(tmp_path / "run") == losses(whole)
    kinds = [line["kind"] for line in read_metrics(stage / "metrics.jsonl")]
    assert (kinds.count("train"), kinds.count("held_out")) == (12, 3)


def test_two_ranks_and_accumulation_learn_the_same(whole, tiny, tmp_path):
    """Stopped on two ranks with two micro batches each, resumed on one."""
    ranks = ("parallel.processes=2", "parallel.micro_batch=2")
    first = tiny(*PRETRAIN, *ranks, "pretrain.samples=48")
    assert train_here(first, "pretrain") == "done"
    manifest = checkpoint.read_manifest(tmp_path / "run/pretrain/checkpoints/step_000000000048")
    assert manifest["meta"]["world_size"] == 2
    assert train(tiny(*PRETRAIN), "pretrain") == "done"
    ours, theirs = losses(tmp_path / "run"), losses(whole)
    # the learning rate falls over the last third of the run, which was shorter at first: compare up to there
    assert [ours[samples] for samples in (8, 16, 24, 32)] == pytest.approx(
        [theirs[samples] for samples in (8, 16, 24, 32)], rel=1e-5
    )


def test_two_ranks_resume_exactly(tiny, tmp_path):
    ranks = ("parallel.processes=2",)
    straight = tiny(*PRETRAIN, *ranks, run_dir=tmp_path / "straight")
    assert train_here(straight, "pretrain") == "done"
    # what a kill of both ranks leaves: the checkpoint at 64, and no word of an end
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    stage = tmp_path / "killed" / "pretrain"
    shutil.rmtree(stage / "checkpoints/step_000000000096")
    (stage / "status.json").unlink()
    assert train_here(tiny(*PRETRAIN, *ranks, run_dir=tmp_path / "killed"), "pretrain") == "done"
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    ours, theirs = (
        tensors(tmp_path / run / "pretrain/checkpoints/step_000000000096") for run in ("killed", "straight")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_leaves_all_there_is_to_know(whole):
    stage = whole / "pretrain"
    for name in ("config.yaml", "command.txt", "environment.txt", "status.json", "export/dit.safetensors"):
        assert (stage / name).stat().st_size > 0
    assert list((stage / "tensorboard").glob("events*"))
    assert list((stage / "samples").glob("step_*/*decoded.flac"))
    assert "torch==" in (stage / "environment.txt").read_text()
    assert "done" in (stage / "logs/rank_0.log").read_text()
    line = [line for line in read_metrics(stage / "metrics.jsonl") if line["kind"] == "train"][-1]
    assert line["samples"] == 96
    assert len(line["loss_bins"]) == 8
    assert json.loads((stage / "status.json").read_text())["state"] == "done"


def test_last_checkpoints_are_kept(whole):
    kept = sorted(path.name for path in (whole / "pretrain/checkpoints").iterdir())
    assert kept == ["step_000000000064", "step_000000000096"]


@pytest.mark.parametrize("stage", ["pretrain", "autoencode", "quantize", "prior", "finetune", "distill"])
def test_a_stage_moves_all_that_it_computes_with_except_the_frozen_base(tiny, tmp_path, stage):
    short = [f"{name}.samples=8" for name in ("pretrain", "autoencode", "finetune")]
    config = tiny(*PRETRAIN, *short, "quantizer.vectors=64")
    for before in [name for name in trained_stages()[: trained_stages().index(stage)] if name != "prior"]:
        assert train(config, before) == "done"
    task = make_task(config, stage)
    task.to(torch.device("meta"))
    parts = [task.module, task.autoencoder, *([task.codec] if isinstance(task, CodecTask) else [])]
    tensors = {tensor for part in parts for tensor in part.state_dict(keep_vars=True).values()}
    base = frozen_base(task.module)
    assert {tensor.device.type for tensor in tensors - base} == {"meta"}
    assert {tensor.device.type for tensor in base} == (
        {"cpu"} if stage in ("autoencode", "finetune", "distill") else set()
    )


def test_another_config_is_refused_and_nothing_is_lost(whole, tiny):
    before = sorted(path.name for path in whole.rglob("*"))
    with pytest.raises(ValueError, match=r"pretrain\.lr \(0\.0003 → 0\.1\).*run_dir"):
        train(tiny(*PRETRAIN, "pretrain.lr=0.1", run_dir=whole), "pretrain")
    assert sorted(path.name for path in whole.rglob("*")) == before


def test_learning_rate_is_a_function_of_samples():
    settings = TrainConfig(samples=1000, global_batch=10, lr=1.0, warmup=100, decay=0.5)
    rates = [learning_rate(settings, samples) for samples in (0, 40, 90, 490, 500, 750, 990)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.02])
    assert learning_rate(TrainConfig(lr=1.0, warmup=0, decay=0.0), 10**9) == 1.0


def test_a_loss_that_is_not_finite_ends_the_run_with_the_mend(tiny):
    with pytest.raises(ValueError, match=r"lower pretrain\.lr"):
        train(tiny(*PRETRAIN, "pretrain.lr=1e15", "pretrain.clip_norm=1e30", "pretrain.warmup=0"), "pretrain")


def test_a_full_disk_ends_the_run_and_takes_nothing_older(whole, tiny, tmp_path, monkeypatch):
    """The save is under way while training goes on: the run ends at the first step after it failed, and can go on."""
    plain, written = checkpoint.write_safetensors, []

    def full(path, *arguments):
        if len(written) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        plain(path, *arguments)

    config = tiny(*PRETRAIN)
    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(OSError, match="no space left") as error:
        train(config, "pretrain")
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    kept = [path.name for path in (tmp_path / "run/pretrain/checkpoints").iterdir()]
    assert kept == ["step_000000000032"]
    assert "no space left" in (tmp_path / "run/pretrain/logs/rank_0.log").read_text()
    assert train(config, "pretrain") == "done"
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("NCCL error … Last error: Failed to CUDA malloc 10485760 bytes"),
    ],
    ids=["torch", "cublas", "nccl"],
)
def test_out_of_memory_is_explained(error, tiny, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("trainer.ranks.strategy.Replicated.forward", full)
    told = r"(?s)out of memory in pretrain on 1 rank.*predicted.*parallel\.micro_batch=4"
    with pytest.raises(ValueError, match=told):
        train(tiny(*PRETRAIN), "pretrain")
    log = (tmp_path / "run/pretrain/logs/rank_0.log").read_text()
    assert str(error) in log
    assert "predicted" in log
