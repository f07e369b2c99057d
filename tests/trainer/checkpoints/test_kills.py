"""Killed at any moment, again and again, a run comes out as if nobody had touched it."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch

from tests.trainer import rank_processes
from tests.trainer.test_loop import losses, tensors
from trainer.checkpoints import checkpoint
from trainer.loop import train
from trainer.recipes.reading import load_recipe

pytestmark = pytest.mark.alone

SAMPLES = 640
RUN = (f"pretrain.samples={SAMPLES}", "log.every=8", "log.samples_every=0", "log.held_out=4", "log.clips=1")
QUICK = ("parallel.threads=1", "parallel.device=cpu", "checkpoint.every=16", *RUN)


def work(rank: int, run_dir: str, prepared: str, *overrides: str) -> None:
    os.setpgrp()  # a kill is of this process alone
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    paths = [f"run_dir={run_dir}", f"data.latents={prepared}/latents", f"data.audio={prepared}/audio"]
    train(load_recipe("tiny", [*paths, *QUICK, *overrides]), "pretrain")


def finished(run: Path) -> bool:
    return (run / "pretrain/export/dit.safetensors").exists()


def saves(run: Path) -> set[Path]:
    """Checkpoints that are being written, or were when a rank was killed."""
    return set((run / "pretrain/checkpoints").glob("tmp_step_*"))


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    assert rank_processes.run(work, 1, str(run), str(prepared)) == [0]
    return run


def killed(run: Path, prepared: Path, chance: random.Random, *, inside_a_save: bool, world_size: int, overrides) -> str:
    """Start, and kill after a while, or as soon as a checkpoint is being written; says what was hit."""
    left = saves(run)  # by the ranks before
    processes = rank_processes.start(work, world_size, str(run), str(prepared), *overrides)
    end = time.monotonic() + chance.uniform(0.3, 2.2)
    while any(process.is_alive() for process in processes):
        if inside_a_save and saves(run) - left:
            break
        if not inside_a_save and time.monotonic() > end:
            break
        time.sleep(0.0005)
    saving = bool(saves(run) - left)
    for process in chance.sample(processes, len(processes)):
        process.kill()
        process.join()
    return "save" if saving else "step"


@pytest.mark.slow
def test_fifty_kills_change_nothing(whole, prepared, tmp_path):
    """Bit for bit, as strategy and world size stay the same."""
    chance, run, hit = random.Random(4), tmp_path / "run", []
    reached = -1
    for number in range(50):
        hit.append(killed(run, prepared, chance, inside_a_save=number % 3 == 0, world_size=1, overrides=()))
        newest = checkpoint.newest(run / "pretrain/checkpoints")
        if newest is not None:
            assert checkpoint.find_problems(newest) == []
            assert checkpoint.samples_of(newest) >= reached  # nothing that was whole is lost
            reached = checkpoint.samples_of(newest)
        if finished(run) and number < 49:  # more kills than the run is long: once more from where it was half-way
            (run / "pretrain/export/dit.safetensors").unlink()
            for path in checkpoint.checkpoints(run / "pretrain/checkpoints")[1:]:
                checkpoint.discard([path])
            reached = -1
    assert hit.count("save") >= 5, hit
    assert hit.count("step") >= 5, hit
    assert rank_processes.run(work, 1, str(run), str(prepared)) == [0]
    ours, theirs = (tensors(path / f"pretrain/checkpoints/step_{SAMPLES:012d}") for path in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(run) == losses(whole)
    assert not list((run / "pretrain/checkpoints").glob("tmp_*"))


def test_kills_with_another_strategy_and_world_size_each_time(whole, prepared, tmp_path):
    chance, run = random.Random(5), tmp_path / "run"
    ways = [("ddp", 2), ("fsdp2", 2), ("ddp", 1), ("fsdp2", 1)]
    for number in range(12):
        strategy, world_size = ways[number % len(ways)]
        overrides = (f"parallel.strategy={strategy}",)
        killed(run, prepared, chance, inside_a_save=True, world_size=world_size, overrides=overrides)
    assert rank_processes.run(work, 2, str(run), str(prepared), "parallel.strategy=fsdp2") == [0, 0]
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
