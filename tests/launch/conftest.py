from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.launch.codecs import export_codec
from tests.launch.slurm_fakes import Fakes


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """No SLURM, but something that answers like one."""
    fakes = Fakes(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fakes.bin}{os.pathsep}{os.environ['PATH']}")
    return fakes


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of an untrained codec with a prior that expects what it gets."""
    return export_codec(tmp_path_factory.mktemp("codec"))
