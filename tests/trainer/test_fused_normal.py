"""The kernel for noise, run by Triton's interpreter on a CPU, and what happens where Triton does not work."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from trainer import randomness

PROGRAM = """
import torch
from trainer import randomness

for batch, shape in ((1, (1,)), (3, (7,)), (2, (4, 257)), (2, (3, 1000))):
    keys = randomness.keys(5, "noise", torch.arange(batch) + 10**12)
    drawn = randomness._drawn_by_kernel(keys, shape)
    print(drawn.shape == (batch, *shape), torch.equal(drawn, randomness.normal(keys, *shape)))
"""


def test_the_kernel_draws_the_plain_codes_numbers(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when Triton is imported
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 8


@pytest.fixture
def tried(monkeypatch):
    """Returns whether a kernel passes the trial at the first draw; its device is the CPU here."""

    def use(kernel):
        monkeypatch.setattr(randomness, "_drawn_by_kernel", kernel)
        return randomness._kernel_works.__wrapped__(torch.device("cpu"))

    return use


def test_a_kernel_that_works_passes_the_trial(tried, caplog):
    with caplog.at_level(logging.WARNING):
        assert tried(lambda keys, shape: randomness._plain_normal(keys, *shape))
    assert caplog.records == []


def test_a_kernel_that_fails_is_not_used(tried, caplog):
    def fails(keys, shape):
        raise RuntimeError("Failed to find C compiler")

    assert not tried(fails)
    assert "Failed to find C compiler" in caplog.text


def test_a_kernel_that_draws_other_numbers_is_not_used(tried, caplog):
    assert not tried(lambda keys, shape: randomness._plain_normal(keys, *shape) * (1 + 1e-6))
    assert "other numbers" in caplog.text
