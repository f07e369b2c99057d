"""Noise that is read a few frames at a time."""

from __future__ import annotations

import pytest
import torch

from models import noise_rows
from models.noise_rows import NoiseRow


@pytest.mark.parametrize("small", [0, 2**20])
@pytest.mark.parametrize(
    ("channels", "frames"), [(1, 65), (3, 23), (4, 16), (2, 33), (5, 77), (7, 1001), (128, 999), (3, 52)]
)
@pytest.mark.parametrize("portion", [1, 7, 16, 50, 2000])
def test_what_is_read_in_portions_is_what_torch_draws_at_once(channels, frames, portion, small, monkeypatch):
    monkeypatch.setattr(noise_rows, "_SMALL", small)
    monkeypatch.setattr(noise_rows, "_SKIPPED_AT_ONCE", 100)
    row = NoiseRow(5, channels, frames)
    parts = [row.read(min(portion, frames - first)) for first in range(0, frames, portion)]
    whole = torch.randn((channels, frames), generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.cat(parts, dim=1), whole)
