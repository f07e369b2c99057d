"""The section of `gpu.py` that turns each mend off alone, beside the loop with all of them on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from unittest import mock

import torch
from gpu_cases import Case, Row, Setting
from gpu_peers import use_pefts_layers
from gpu_training import STAGE, TEXT, alternating, recipe, take_step, training
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from models.fused import use
from trainer import inputs, randomness
from trainer.ranks.strategy import blocks_of
from trainer.training import Training

OFF = {
    "LoRA as one function": lambda prepared: _pefts_layers(prepared.task.module),
    "noise as one Triton kernel": lambda prepared: mock.patch.object(randomness, "_kernel_works", return_value=False),
    "norms and heads as Triton kernels": lambda prepared: mock.patch.object(use, "_works", return_value=False),
    "weights cast together": lambda prepared: mock.patch.object(prepared.strategy.computed, "_casts", None),
    "levels and drops drawn on the host": lambda prepared: _drawn_on_the_device(prepared),
    "pinned copies": lambda prepared: mock.patch.object(inputs, "moved", _pageable),
    "a step read one late": lambda prepared: mock.patch.object(type(prepared.strategy), "waits_for_steps", True),
    "compiled blocks": lambda prepared: _eager(prepared.task.module),
    "CUDA graphs": lambda prepared: mock.patch.object(prepared.strategy.graphs, "_recording", return_value=None),
}
"""The mends, and how each is turned off while the training goes on."""
NEEDED = {"compiled blocks": ("parallel.compile=true",), "CUDA graphs": ("parallel.graph=true",)}
"""Settings that turn a mend on, where they are not the default."""


def cases(setting: Setting) -> Mapping[str, Case]:
    """Return a case for each mend, at few clips, where the host is what is slow."""
    return {name: partial(_compare, name=name, setting=setting) for name in OFF}


def _compare(row: Row, name: str, setting: Setting) -> None:
    clips = 2 if setting.small else 8
    batch = (f"{STAGE}.global_batch={clips}", "parallel.precision=bf16", "parallel.compile=false", *TEXT[False])
    rounds, count = (1, 2) if setting.small else (4, 6)
    with training(setting, recipe(setting, name, *batch, *NEEDED.get(name, ()))) as prepared:

        def without() -> None:
            with OFF[name](prepared):
                take_step(prepared)

        steps = {"on": lambda: take_step(prepared), "off": without}
        seconds = alternating(steps, setting.device, rounds=rounds, count=count)
    figures = {f"{how}, ms a step": 1000 * value for how, value in seconds.items()}
    row(name, **figures, **{"off / on": seconds["off"] / seconds["on"]})


@contextmanager
def _pefts_layers(module: nn.Module) -> Iterator[None]:
    layers = [layer for layer in module.modules() if isinstance(layer, PeftLinear)]
    kinds = [type(layer) for layer in layers]
    use_pefts_layers(module)
    try:
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind


@contextmanager
def _eager(module: nn.Module) -> Iterator[None]:
    blocks = blocks_of(module)
    compiled = [block._compiled_call_impl for block in blocks]
    for block in blocks:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in zip(blocks, compiled, strict=True):
            block._compiled_call_impl = call


def _drawn_on_the_device(prepared: Training) -> AbstractContextManager[object]:
    """Leave the batch without draws, so that the module draws them where the positions are."""
    plain = inputs.Inputs.to
    return mock.patch.object(inputs.Inputs, "to", lambda batch, device, draws=None: plain(batch, device, {}))


def _pageable(value: Tensor, device: torch.device) -> Tensor:
    return value.to(device)
