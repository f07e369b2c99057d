"""Compiling a module's Transformer blocks with torch.compile, where that works."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils._triton import has_triton

from trainer.recipes.parallel import ParallelConfig

logger = logging.getLogger(__name__)

_VARIANTS = 64
"""Variants of a block's code that torch may compile, in place of 8: with and without gradient, lengths, precisions."""


def compiles(config: ParallelConfig, device: torch.device) -> bool:
    """Whether this rank's device runs compiled blocks: as `parallel.compile` says; if it is null, on CUDA where it can.

    On a CPU a compiled block is hardly faster, and compiling it takes minutes.
    """
    if config.compile is not None:
        return config.compile
    if device.type != "cuda" or config.strategy == "zero3":
        return False
    if missing := find_missing():
        logger.warning("blocks are not compiled, and training is slower: %s is missing on this machine", missing)
    return not missing


def compile_blocks(blocks: Iterable[nn.Module], *, required: bool) -> None:
    """Have each block compiled at its first use; if not `required`, one that cannot be compiled runs as it is."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    torch._dynamo.config.suppress_errors = not required
    for block in blocks:
        block.compile()


def find_missing() -> str | None:
    """Return what torch's compiler for CUDA lacks here; None if it has all."""
    if not has_triton():
        return "Triton (a part of torch's builds for CUDA)"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "a C compiler (gcc)"
    return None
