"""Fixtures for several tests: latents of synthesized sounds, prepared once, and the tiny recipe on those latents."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch import pipeline
from models import disk_errors
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config

for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    # A shell's background jobs and nohup ignore these, as would every command that the tests start and signal.
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

pytest_plugins = ["tests.system_packages", "tests.mutant_counts"]
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _no_rank_left() -> Iterator[None]:
    """Remove LOCAL_RANK after each module.

    A DeepSpeed engine that a test did not close leaves it set, and later commands would take that rank as theirs.
    """
    before = os.environ.get("LOCAL_RANK")
    yield
    if before is None:
        os.environ.pop("LOCAL_RANK", None)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that a test lets fail is asked again at once."""
    monkeypatch.setattr(disk_errors, "PAUSES", (0.0,) * len(disk_errors.PAUSES))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare the latents of three minutes of synthesized sounds, cut as the tiny recipe requires."""
    folder = tmp_path_factory.mktemp("prepared")
    config = load_recipe("tiny", [f"run_dir={folder}", "data.workers=1"])
    pipeline.synth(config)
    pipeline.prepare_latents(config)
    return folder


@pytest.fixture
def tiny(prepared: Path, tmp_path: Path):
    """Return a function that loads the tiny recipe on `prepared`, with its run directory below tmp_path."""

    def make(*overrides: str, run_dir: Path = tmp_path / "run") -> Config:
        paths = [f"run_dir={run_dir}", f"data.latents={prepared / 'latents'}", f"data.audio={prepared / 'audio'}"]
        return load_recipe("tiny", [*paths, "parallel.threads=1", "parallel.device=cpu", *overrides])

    return make
