"""A residual connection and the layer norm after it as one function, with or without AdaLN's shift, scale and gate.

    total = x + gate · y          (or x alone)
    out   = norm(total) · (1 + scale) + shift, or with a learned weight and bias

torch computes this in up to eight kernels and saves x in two dtypes. On a GPU one kernel computes both lines, and one
the gradients, where the gradient of `total` from its other uses is added to the norm's.

Shape suffixes: B batch, S tokens of a sequence, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.fused.use import applies, in_rows, launch, output_dtype, steps, trial_numbers, widest

_EPS = 1e-6
_ROWS = 16
"""Tokens of a program that sums over tokens."""


class Norm(NamedTuple):
    """What follows the normalisation: `(offset + scale) · … + shift`."""

    shift: Tensor
    """(B, 1, D), or (D,) for all samples."""
    scale: Tensor
    """As `shift`."""
    offset: int
    eps: float


def modulated(x_BSD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> tuple[Tensor, Tensor]:
    """Apply AdaLN: a layer norm without learned weights, then a shift and scale computed from the noise level.

    Returns x and the result. Use that x from here on: its gradients are then added in the kernel of the norm.
    """
    if not _fuses((x_BSD,), (shift_B1D, scale_B1D)):
        return x_BSD, _plain_modulated(x_BSD, shift_B1D, scale_B1D)
    return _normed(x_BSD, Norm(shift_B1D, scale_B1D, 1, _EPS))


def sum_modulated(
    x_BSD: Tensor, y_BSD: Tensor, gate_B1D: Tensor, shift_B1D: Tensor, scale_B1D: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x + gate · y, and its AdaLN."""
    if not _fuses((x_BSD, y_BSD), (gate_B1D, shift_B1D, scale_B1D)):
        total_BSD = x_BSD + gate_B1D * y_BSD
        return total_BSD, _plain_modulated(total_BSD, shift_B1D, scale_B1D)
    return _sum_normed(x_BSD, y_BSD, gate_B1D, Norm(shift_B1D, scale_B1D, 1, _EPS))


def gated_sum(x_BSD: Tensor, y_BSD: Tensor, gate_B1D: Tensor) -> Tensor:
    """Return x + gate · y."""
    if not _fuses((x_BSD, y_BSD), (gate_B1D,)):
        return x_BSD + gate_B1D * y_BSD
    return _GatedSum.apply(x_BSD, y_BSD, gate_B1D)


def layer_normed(x_BSD: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return x, as `modulated` does, and its layer norm with learned weights."""
    if not _fuses((x_BSD,), (norm.weight, norm.bias)):
        return x_BSD, norm(x_BSD)
    return _normed(x_BSD, Norm(norm.bias, norm.weight, 0, norm.eps))


def sum_layer_normed(x_BSD: Tensor, y_BSD: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return x + y, and its layer norm with learned weights."""
    if not _fuses((x_BSD, y_BSD), (norm.weight, norm.bias)):
        total_BSD = x_BSD + y_BSD
        return total_BSD, norm(total_BSD)
    return _sum_normed(x_BSD, y_BSD, None, Norm(norm.bias, norm.weight, 0, norm.eps))


def _fuses(tokens: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether kernels compute with these tensors: tokens (B, S, D), and weights (B, 1, D) or (D,)."""
    shape = tokens[0].shape
    if len(shape) != 3 or any(value.shape != shape for value in tokens):
        return False
    known = (shape[0], 1, shape[2]), (shape[2],)
    return all(value.shape in known for value in weights) and applies(_trial, *tokens, *weights)


def _plain_modulated(x_BSD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    return F.layer_norm(x_BSD, x_BSD.shape[-1:], eps=_EPS) * (1 + scale_B1D) + shift_B1D


def _normed(x_BSD: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    return _SumNorm.apply(x_BSD, None, None, *norm, output_dtype(x_BSD, norm.shift, norm.scale))


def _sum_normed(x_BSD: Tensor, y_BSD: Tensor, gate_B1D: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    return _SumNorm.apply(x_BSD, y_BSD, gate_B1D, *norm, output_dtype(x_BSD, y_BSD, norm.shift, norm.scale))


class _GatedSum(torch.autograd.Function):
    """x + gate · y as one of torch's own kernels, and another one for the gradient of y."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, y_BSD: Tensor, gate_B1D: Tensor) -> Tensor:
        ctx.save_for_backward(gate_B1D, y_BSD if ctx.needs_input_grad[2] else None)
        ctx.dtypes = x_BSD.dtype, y_BSD.dtype
        dtype = widest(x_BSD, y_BSD, gate_B1D)
        return torch.addcmul(x_BSD.to(dtype), gate_B1D.to(dtype), y_BSD.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_BSD,), (gate_B1D, y_BSD), (x_dtype, y_dtype) = gradients, ctx.saved_tensors, ctx.dtypes
        of_gate = None if y_BSD is None else (gradient_BSD.float() * y_BSD).sum(1, keepdim=True).to(gate_B1D.dtype)
        return gradient_BSD.to(x_dtype), (gradient_BSD * gate_B1D).to(y_dtype), of_gate


class _SumNorm(torch.autograd.Function):
    """`total` and `out`; with neither y nor a gate, `total` is x."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BSD: Tensor,
        y_BSD: Tensor | None,
        gate_B1D: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        offset: int,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        x_BSD, y = in_rows(x_BSD), x_BSD if y_BSD is None else in_rows(y_BSD)
        gate = x_BSD if gate_B1D is None else in_rows(gate_B1D)
        shift, scale = in_rows(shift), in_rows(scale)
        batch, tokens, width = x_BSD.shape
        adds = [value for value in (y_BSD, gate_B1D) if value is not None]
        total = x_BSD.new_empty(x_BSD.shape, dtype=widest(x_BSD, *adds)) if adds else x_BSD
        out = x_BSD.new_empty(x_BSD.shape, dtype=dtype)
        means, roots = x_BSD.new_empty(2, batch, tokens, dtype=torch.float32)
        strides = (*steps(x_BSD), *steps(y), *(_by_sample(value) for value in (gate, shift, scale)))
        flags = {"ADDS": bool(adds), "GATED": gate_B1D is not None, "OFFSET": offset, **_block(width)}
        tensors = (x_BSD, y, gate, shift, scale, total, out, means, roots)
        launch("sum_norm", (tokens, batch), *tensors, *strides, tokens, width, eps, **flags)
        ctx.save_for_backward(total, means, roots, scale, gate_B1D, y_BSD if ctx.needs_input_grad[2] else None)
        ctx.offset, ctx.dtypes = offset, (x_BSD.dtype, y.dtype)
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total, means, roots, scale, gate_B1D, y_BSD = ctx.saved_tensors
        of_total, of_out = gradients
        of_out = torch.zeros_like(total) if of_out is None else in_rows(of_out)
        passed = of_out if of_total is None else in_rows(of_total)
        x_dtype, y_dtype = ctx.dtypes
        apart = gate_B1D is not None or x_dtype != y_dtype  # else both gradients are the same numbers
        of_x = total.new_empty(total.shape, dtype=x_dtype)
        of_y = total.new_empty(total.shape, dtype=y_dtype) if apart else of_x
        gate, y = (total if value is None else in_rows(value) for value in (gate_B1D, y_BSD))
        batch, tokens, width = total.shape
        summed = any(ctx.needs_input_grad[2:5])
        rows = _ROWS if summed else 1
        parts = -(-tokens // rows)
        sums = total.new_empty((batch, parts, 3, width) if summed else (1,), dtype=torch.float32)
        tensors = (of_out, passed, total, means, roots, scale, y, gate, of_x, of_y, sums)
        by_token = (step for value in (of_out, passed, total, y) for step in steps(value))
        sizes = (*by_token, _by_sample(gate), _by_sample(scale), tokens, width)
        passes = {"PASSED": of_total is not None, "APART": apart, "GATED": gate_B1D is not None, "SUMS": summed}
        flags = {**passes, "OFFSET": ctx.offset, "ROWS": rows, **_block(width)}
        launch("sum_norm_backward", (parts, batch), *tensors, *sizes, **flags)
        weights = _of_weights(ctx, sums, gate_B1D, scale) if summed else (None, None, None)
        return of_x, of_y if ctx.needs_input_grad[1] else None, *weights, None, None, None


def _of_weights(ctx: Any, sums_BP3D: Tensor, gate: Tensor | None, scale: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of gate, shift and scale, from the sums over the tokens of each program."""
    for_all = scale.ndim == 1
    shift_scale_gate = sums_BP3D.sum((0, 1) if for_all else 1).unbind(-2)
    of_shift, of_scale, of_gate = (value if for_all else value[:, None] for value in shift_scale_gate)
    wanted = zip(ctx.needs_input_grad[2:5], (of_gate, of_shift, of_scale), (gate, scale, scale), strict=True)
    return tuple(value.to(like.dtype) if wants and like is not None else None for wants, value, like in wanted)


def _by_sample(value: Tensor) -> int:
    """Return the stride of samples of a tensor (B, 1, D), or 0 for one that is the same for all."""
    return 0 if value.ndim == 1 else value.stride(0)


def _block(width: int) -> dict[str, int]:
    block = 1 << (width - 1).bit_length()
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def _trial(device: torch.device, dtype: torch.dtype, fused: bool) -> tuple[Tensor, ...]:
    """See `applies`."""
    numbers = partial(trial_numbers, device=device, dtype=dtype)
    x_BSD, y_BSD, weights = numbers(2, 19, 40), numbers(2, 19, 40), numbers(2, 1, 120)
    gate, shift, scale = weights.chunk(3, -1)
    if fused:
        results = _sum_normed(x_BSD, y_BSD, gate, Norm(shift, scale, 1, _EPS))
    else:
        total = x_BSD + gate * y_BSD
        results = total, _plain_modulated(total, shift, scale)
    loss = torch.stack([value.float().square().sum() for value in results]).sum()
    return *results, *torch.autograd.grad(loss, (x_BSD, y_BSD, weights))
