"""Latents that exist already: a run's own have the settings of its recipe, and those of others are told apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launch.pipeline import prepare_latents
from launch.slurm import submit
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config

LATENTS = Path(__file__).parents[1] / "golden/old_run/latents"
AS_PREPARED = ("data.clip_seconds=0.19", "data.holdout=0.2", "seed=0")
OTHER = ("data.clip_seconds=0.7", "data.holdout=0.2", "seed=7")


def recipe(run: Path, *settings: str) -> Config:
    """Return a recipe whose crops fit into short clips."""
    return load_recipe("tiny", [f"run_dir={run}", "data.buckets=[9]", *settings])


def test_a_runs_own_latents_have_the_settings_of_its_recipe(tmp_path, capsys):
    shutil.copytree(LATENTS, tmp_path / "latents")
    prepare_latents(recipe(tmp_path, *AS_PREPARED))
    assert capsys.readouterr().err == f"  made before: {tmp_path / 'latents'}\n"
    line = r"latents was prepared with other settings: set data\.clip_seconds=0\.19 seed=0, or move it elsewhere"
    with pytest.raises(ValueError, match=line):
        prepare_latents(recipe(tmp_path, *OTHER))
    with pytest.raises(ValueError, match=line):
        submit.scripts(recipe(tmp_path, *OTHER, "cluster=slurm"))


def test_other_settings_of_shared_latents_are_told(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/latents").symlink_to(LATENTS)
    for latents in (LATENTS, tmp_path / "run/latents"):
        prepare_latents(recipe(tmp_path / "run", *OTHER, f"data.latents={latents}"))
        expected = f"  made before: {latents}, prepared with data.clip_seconds=0.19 seed=0\n"
        assert capsys.readouterr().err == expected
