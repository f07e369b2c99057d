"""What the tests of strategies share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.ranks.strategies import make_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a frozen D, for the recipe of `strategies`."""
    folder = tmp_path_factory.mktemp("strategies")
    make_base(folder)
    return folder
