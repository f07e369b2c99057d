"""The section of `gpu.py` on keyed random numbers: a run is the same everywhere only if they are the CPU's.

The kernels of norms and heads follow, whose numbers are a CPU's to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from gpu_cases import Case, NotAvailable, Row, Setting
from torch import Tensor

from models.fused import heads, norm, use
from trainer import randomness

Draw = Callable[[Tensor, int, int], Tensor]


def cases(setting: Setting) -> Mapping[str, Case]:
    """Return a case for each way to draw, and for each part of the models that has kernels."""
    ways: dict[str, tuple[Draw, Draw]] = {
        "uniform": (randomness.uniform, randomness.uniform),
        "normal, plain": (randomness._plain_normal, randomness._plain_normal),
        "normal, one Triton kernel": (_by_kernel, randomness._plain_normal),
    }
    parts = {"norms": norm._trial, "heads": heads._trial}
    draws = {name: lambda row, name=name: _compare(row, name, *ways[name], setting) for name in ways}
    return draws | {name: partial(_off_by, name=name, trial=trial, setting=setting) for name, trial in parts.items()}


def _off_by(row: Row, name: str, trial: use.Trial, setting: Setting) -> None:
    """Compare a part's kernels with its plain form in float32 on the same device."""
    device = torch.device(setting.device)
    if device.type != "cuda":
        raise NotAvailable("Triton's kernels run on a GPU alone")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    off = {f"off by, in {of}": use.off_by(trial, device, dtype) for of, dtype in dtypes.items()}
    row(name, **off, equal="yes" if use._works(trial, device) else "no")


def _compare(row: Row, name: str, draw: Draw, as_on_cpu: Draw, setting: Setting) -> None:
    """Compare what the device draws with what the CPU draws, bit for bit."""
    shape = (3, 1001) if setting.small else (128, 500)
    on_cpu = randomness.keys(7, "noise", torch.arange(32) + 10**12)
    ours = draw(on_cpu.to(setting.device), *shape).cpu()
    theirs = as_on_cpu(on_cpu, *shape)
    differing = int((ours.view(torch.int32) != theirs.view(torch.int32)).sum())
    furthest = float((ours - theirs).abs().max())
    row(name, numbers=ours.numel(), differing=differing, furthest=furthest, equal="no" if differing else "yes")


def _by_kernel(keys_B: Tensor, *shape: int) -> Tensor:
    if keys_B.device.type != "cuda":
        raise NotAvailable("Triton's kernel runs on a GPU alone")
    return randomness._drawn_by_kernel(keys_B, shape)
