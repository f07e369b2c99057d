"""Whether a run directory holds a run with the settings of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.run_directory import RunDirectory


def recipe(strategy: str, clip_norm: str) -> Config:
    return load_recipe("tiny", [f"parallel.strategy={strategy}", f"pretrain.clip_norm={clip_norm}"])


def with_zero(folder: Path, strategy: str) -> RunDirectory:
    """A run of an older version with a checkpoint and `clip_norm: 0.0` in its config."""
    run = RunDirectory(folder, "pretrain")
    run.claim(recipe(strategy, "123.0"), {})
    text = (folder / "config.yaml").read_text()
    assert text.count("clip_norm: 123.0") == 1
    (folder / "config.yaml").write_text(text.replace("clip_norm: 123.0", "clip_norm: 0.0"))
    (run.checkpoints / "step_000000000008").mkdir(parents=True)
    return run


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_a_run_that_clipped_at_0_under_zero_goes_on_without_clipping(tmp_path, strategy):
    run = with_zero(tmp_path, strategy)
    run.require_same(recipe(strategy, "null"))
    with pytest.raises(ValueError, match=r"pretrain\.clip_norm \(None → 1\.0\)"):
        run.require_same(recipe(strategy, "1.0"))
    with pytest.raises(ValueError, match="null turns clipping off"):
        recipe(strategy, "0")


def test_a_run_that_clipped_at_0_under_ddp_learned_nothing_and_is_another(tmp_path):
    run = with_zero(tmp_path, "ddp")
    with pytest.raises(ValueError, match=r"pretrain\.clip_norm \(0\.0 → None\)"):
        run.require_same(recipe("ddp", "null"))


def test_a_checkpoint_that_names_clipping_at_0_is_the_same_under_zero(tmp_path):
    run, without, at_0 = RunDirectory(tmp_path, "pretrain"), recipe("zero2", "null"), recipe("zero2", "null")
    at_0.pretrain.clip_norm = 0.0
    stored = run.identity(at_0, {"latents": "x"}, with_paths=True)
    assert run.identity(without, {"latents": "x"}, with_paths=True) != stored
    assert run.identity(without, {"latents": "x"}, with_paths=True, zero_clip=True) == stored
    ddp = recipe("ddp", "null")
    assert run.identity(ddp, {}, zero_clip=True) == run.identity(ddp, {})
