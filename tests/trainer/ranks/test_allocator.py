"""The settings of torch's allocator of GPU memory, which a user may have chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trainer.ranks.allocator import prepare_allocator


@pytest.fixture
def environment(monkeypatch) -> dict[str, str]:
    found: dict[str, str] = {}
    monkeypatch.setattr("trainer.ranks.allocator.os.environ", found)
    return found


def settings(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if "ALLOC_CONF" in name}


def test_segments_can_grow(environment):
    prepare_allocator()
    assert settings(environment) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_what_the_user_has_set_stays(environment, name):
    environment[name] = "max_split_size_mb:512"
    prepare_allocator()
    assert settings(environment) == {name: "max_split_size_mb:512"}


def test_torch_reads_the_setting_after_its_import():
    code = (
        "import torch; from trainer.ranks.allocator import prepare_allocator; prepare_allocator(); "
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    told = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "expandable_segments:True"
