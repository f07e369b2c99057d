"""Keeps the trackers of these tests in folders of their own, without a server, and reads back what they hold."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import PartialState

_folder = tempfile.TemporaryDirectory(prefix="trackio-")
os.environ["TRACKIO_DIR"] = _folder.name  # Trackio reads it when it is imported


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


@pytest.fixture(autouse=True)
def _accelerate() -> Iterator[None]:
    """Accelerate's trackers need its state, which `Parallel` makes for a training."""
    ours = not PartialState._shared_state
    PartialState()
    yield
    if ours:
        PartialState._reset_state()
