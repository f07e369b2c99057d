"""What several tests share: a prepared set of synthesized sounds, made once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch import pipeline
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config

pytest_plugins = ["tests.system_packages"]
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _no_rank_left() -> Iterator[None]:
    """An engine of DeepSpeed that a test did not close leaves its rank behind, which commands would take for theirs."""
    before = os.environ.get("LOCAL_RANK")
    yield
    if before is None:
        os.environ.pop("LOCAL_RANK", None)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of three minutes of synthesized sounds, cut as the tiny recipe wants them."""
    folder = tmp_path_factory.mktemp("prepared")
    config = load_recipe("tiny", [f"run_dir={folder}", "data.workers=1"])
    pipeline.synth(config)
    pipeline.prepare_latents(config)
    return folder


@pytest.fixture
def tiny(prepared: Path, tmp_path: Path):
    """The tiny recipe on those latents, with its run directory under tmp_path; takes overrides."""

    def make(*overrides: str, run_dir: Path = tmp_path / "run") -> Config:
        paths = [f"run_dir={run_dir}", f"data.latents={prepared / 'latents'}", f"data.audio={prepared / 'audio'}"]
        return load_recipe("tiny", [*paths, "parallel.threads=1", "parallel.device=cpu", *overrides])

    return make
