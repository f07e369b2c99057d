"""A run goes on where its files, or those that it builds on, have moved: it knows them by their content."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from launch.cli import main

OLD = Path(__file__).parents[1] / "golden/old_run"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with the latents and D's weights of an older run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "latents", "latents")
    shutil.copytree(OLD / "pretrain/export", "w/weights")
    return tmp_path


def autoencode(samples: int, *overrides: str) -> int:
    """Train g, f and LoRA in the folder `run`, and return the exit status."""
    paths = ("run_dir=run", "data.latents=latents")
    lengths = (f"autoencode.samples={samples}", "checkpoint.every=4")
    return main(["train", str(OLD / "config.yaml"), "stage=autoencode", *paths, *lengths, *overrides])


def test_a_pretrained_folder_may_be_spelled_otherwise_or_lie_elsewhere(here, capsys):
    assert autoencode(4, "pretrained.folder=w/weights") == 0
    assert autoencode(8, f"pretrained.folder={here}/w/weights") == 0
    Path("w").rename("elsewhere")
    assert autoencode(12, "pretrained.folder=elsewhere/weights") == 0
    assert "at 8 samples" in capsys.readouterr().err
    assert json.loads(Path("run/autoencode/status.json").read_text())["samples"] == 12


def test_other_bytes_in_the_pretrained_folder_are_another_run(here, capsys):
    assert autoencode(4, "pretrained.folder=w/weights") == 0
    with Path("w/weights/dit.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert autoencode(8, "pretrained.folder=w/weights") == 2
    assert "input pretrained" in capsys.readouterr().err


def test_a_checkpoint_is_resumed_in_another_run_though_the_weights_have_moved(here):
    assert autoencode(4, "pretrained.folder=w/weights") == 0
    Path("w").rename("elsewhere")
    step = "checkpoint.resume=run/autoencode/checkpoints/step_000000000004"
    assert autoencode(8, "pretrained.folder=elsewhere/weights", "run_dir=other", step) == 0
    assert json.loads(Path("other/autoencode/status.json").read_text())["samples"] == 8


def test_a_checkpoint_that_was_followed_is_not_followed_again_after_it_moved(here):
    """Otherwise the same command, in a run that was copied elsewhere, would set the run back to that checkpoint."""
    for run in ("run", "other"):
        shutil.copytree(OLD / "pretrain", f"{run}/pretrain")
    assert autoencode(4) == 0
    step = "run/autoencode/checkpoints/step_000000000004"
    assert autoencode(8, "run_dir=other", f"checkpoint.resume={step}") == 0
    shutil.copytree(step, "moved/step_000000000004")
    shutil.rmtree("run/autoencode")
    assert autoencode(12, "run_dir=other", "checkpoint.resume=moved/step_000000000004") == 0
    names = sorted(path.name for path in Path("other/autoencode/checkpoints").iterdir())
    assert not [name for name in names if name.startswith("left_")]
    assert json.loads(Path("other/autoencode/status.json").read_text())["samples"] == 12
