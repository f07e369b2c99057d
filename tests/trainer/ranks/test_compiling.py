"""Which devices run compiled blocks, and what happens if a block cannot be compiled."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from trainer.ranks import compiling
from trainer.recipes.parallel import ParallelConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


@pytest.fixture
def machine(monkeypatch):
    def has(*, triton: bool = True, compiler: bool = True) -> None:
        monkeypatch.setattr(compiling, "has_triton", lambda: triton)
        monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/cc" if compiler else None)

    return has


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        ({}, CUDA, True),
        ({}, CPU, False),
        ({"strategy": "zero3"}, CUDA, False),
        ({"strategy": "zero2"}, CUDA, True),
        ({"compile": False}, CUDA, False),
        ({"compile": True}, CPU, True),
    ],
)
def test_cuda_compiles_unless_told_otherwise(settings, device, expected, machine):
    machine()
    assert compiling.compiles(ParallelConfig(**settings), device) is expected


@pytest.mark.parametrize(("lacks", "named"), [({"triton": False}, "Triton"), ({"compiler": False}, "C compiler")])
def test_what_is_missing_is_named(lacks, named, machine, caplog):
    machine(**lacks)
    with caplog.at_level(logging.WARNING):
        assert not compiling.compiles(ParallelConfig(), CUDA)
    assert named in caplog.text


@pytest.fixture
def dynamo():
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=8, suppress_errors=False):
        yield
    torch._dynamo.reset()


def test_a_block_that_cannot_be_compiled_runs_as_it_is(dynamo, monkeypatch):
    block = Block()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", _fail)
    compiling.compile_blocks([block], required=False)
    assert block(torch.ones(1, 2)).shape == (1, 2)


def test_a_block_that_must_be_compiled_says_why_it_cannot(dynamo, monkeypatch):
    block = Block()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", _fail)
    compiling.compile_blocks([block], required=True)
    with pytest.raises(Exception, match="no kernel for this"):
        block(torch.ones(1, 2))


def test_a_block_of_many_lengths_and_modes_stays_compiled(dynamo):
    block = Block()
    compiling.compile_blocks([block], required=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for length in range(1, 12):
            for dtype in (torch.float32, torch.float64):
                with torch.set_grad_enabled(length % 2 == 0):
                    block.to(dtype)(torch.ones(length, 2, dtype=dtype))


def _fail(*_: object, **__: object) -> None:
    raise RuntimeError("no kernel for this")
