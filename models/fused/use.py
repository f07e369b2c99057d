"""Whether kernels in Triton compute a part of a model, and how they are launched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Trial = Callable[[torch.device, torch.dtype, bool], tuple[Tensor, ...]]
"""Maps a device, a dtype, and whether to use kernels, to the results of a small computation, forward and backward."""
Launch = Callable[[str, tuple[Any, ...]], None]
_DEVICES = ("cuda",)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OFF_BY = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""How far a kernel may be off the plain form in float32, relative to the largest number."""
_stand_in: Launch | None = None


def applies(trial: Trial, *tensors: Tensor) -> bool:
    """Whether kernels compute with these tensors; `trial` is compared with its plain form once on each device.

    They do on CUDA devices where Triton works and gives the same numbers, except in code that torch compiles, and for
    weights that are cut among ranks and gathered by hooks on modules (ZeRO-3).
    """
    if torch.compiler.is_compiling():
        return False
    device = tensors[0].device
    if _stand_in is None and device.type not in _DEVICES:
        return False
    if any(hasattr(value, "ds_id") or value.dtype not in _DTYPES or not value.numel() for value in tensors):
        return False
    return _stand_in is not None or _works(trial, device)


def launch(name: str, programs: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel of `models.fused.kernels`; the first argument is a tensor on the device that computes."""
    if _stand_in is not None:
        _stand_in(name, arguments)
        return
    from models.fused import kernels

    with torch.cuda.device_of(arguments[0]):
        getattr(kernels, name)[programs](*arguments, **constants)


@contextmanager
def standing_in(called: Launch) -> Iterator[None]:
    """Take kernels for granted inside a `with`, and call `called` with a name and arguments in place of a launch.

    Tensors without numbers, on any device, then have the shapes and lifetimes that they have on a GPU.
    """
    global _stand_in
    before, _stand_in = _stand_in, called
    try:
        yield
    finally:
        _stand_in = before


def output_dtype(*values: Tensor) -> torch.dtype:
    """Return the dtype in which the next matrix product takes a result: autocast's, or the widest of these tensors."""
    device = values[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return widest(*values)


def widest(*values: Tensor) -> torch.dtype:
    """Return the dtype that torch gives a sum of these tensors, none of which is a scalar."""
    return reduce(torch.promote_types, {value.dtype for value in values})


def in_rows(value: Tensor) -> Tensor:
    """Return a tensor whose last dimension lies together in memory."""
    return value if value.stride(-1) == 1 else value.contiguous()


def steps(value: Tensor) -> tuple[int, int]:
    """Return the strides of samples and of tokens of a tensor (B, S, …)."""
    return value.stride(0), value.stride(1)


@cache
def _works(trial: Trial, device: torch.device) -> bool:
    """Whether kernels run on a device and give the plain form's numbers; the log says why not."""
    part = trial.__module__.rpartition(".")[2]
    try:
        alike = all(off_by(trial, device, dtype) <= bound for dtype, bound in _OFF_BY.items())
    except Exception as error:  # without Triton, a C compiler or a GPU that Triton knows
        logger.warning("%s takes torch's own kernels, which are slower: Triton cannot be used (%s)", part, error)
        return False
    if not alike:
        logger.warning("%s takes torch's own kernels, which are slower: Triton's give other numbers here", part)
    return alike


def off_by(trial: Trial, device: torch.device, dtype: torch.dtype) -> float:
    """Return how far the kernels in a dtype are off the plain form in float32, relative to each result's largest."""
    # The first use may lie in a block whose activations are recomputed: its hooks on saved tensors must see none of
    # the trial's, because the second computation of the block has no trial. Or it lies in a pass without gradients.
    untouched = torch.autograd.graph.saved_tensors_hooks(lambda value: value, lambda value: value)
    with untouched, torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        fused, plain = trial(device, dtype, True), trial(device, torch.float32, False)
    pairs = [(one.detach().float(), other.detach()) for one, other in zip(fused, plain, strict=True)]
    return float(torch.stack([(one - other).abs().max() / other.abs().max() for one, other in pairs]).max())


def trial_numbers(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers for a trial, the same in every dtype; no draw, which would move torch's generators."""
    values = torch.arange(torch.Size(shape).numel(), device=device).mul(0.7).sin().view(shape)
    return values.bfloat16().to(dtype).requires_grad_()
