"""The settings of the allocators of memory, which a user may have chosen."""

from __future__ import annotations

import ctypes
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


ALLOCATES_AND_FREES = """
import ctypes
import resource

import torch

from trainer.ranks.allocator import keep_freed_memory
from trainer.ranks.parallel import Parallel
from trainer.recipes.parallel import ParallelConfig


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.zeros(64 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: one fault would stand for many pages
{begin}
print(min(faults() for _ in range(8)))
"""
MANY = 64 * 2**20 // 2**16
"""Page faults of a process that is given new memory for the block, even if a page has 64 KiB."""
HAS_GLIBC = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def faults_of_a_block_allocated_again(begin: str, **variables: str) -> int:
    ignored = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ignored)}
    command = [sys.executable, "-c", ALLOCATES_AND_FREES.format(begin=begin)]
    told = subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True)
    return int(told.stdout)


@pytest.mark.skipif(not HAS_GLIBC, reason="other C libraries decide for themselves what they give back")
class TestFreedHostMemory:
    def test_ranks_on_cpus_keep_it(self):
        assert faults_of_a_block_allocated_again("Parallel(ParallelConfig(device='cpu'))") < MANY / 10

    def test_glibc_gives_it_back_by_default(self):
        assert faults_of_a_block_allocated_again("") >= MANY

    @pytest.mark.parametrize(
        "variables", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
    )
    def test_what_the_user_has_set_stays(self, variables):
        assert faults_of_a_block_allocated_again("keep_freed_memory()", **variables) >= MANY
