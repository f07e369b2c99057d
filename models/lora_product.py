"""A linear layer and its LoRA as one function: W x + b + s B A x.

PEFT's layer casts x for the adapter, multiplies the output by the scale, and adds; autograd then saves x in two dtypes.
This function computes the same products and saves x and the narrow A x alone.

Shape suffixes: N rows of x, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.fp8_linear import FP8Linear, dequantized, fp8_product


def lora_linear(
    x: Tensor, base: torch.nn.Linear | FP8Linear, a_RI: Tensor, b_OR: Tensor, scale: float
) -> Tensor | None:
    """Return `base(x) + scale · B A x` in the dtype that autocast gives matrix products, or in x's without autocast.

    A base in FP8 stays in FP8: its own product has its own dtypes (`models.fp8_linear`).

    Returns None where the function does not apply: the weights have several dtypes and autocast is off, or they are cut
    among ranks and gathered by hooks on modules (ZeRO-3).
    """
    device = x.device.type
    in_fp8 = isinstance(base, FP8Linear)
    cast_here = [None if in_fp8 else base.weight, base.bias, a_RI, b_OR]
    weights = [weight for weight in cast_here if weight is not None]
    if any(hasattr(weight, "ds_id") for weight in weights):
        return None
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif all(weight.dtype == x.dtype for weight in weights):
        dtype = x.dtype
    else:
        return None
    *frozen, a_RI, b_OR = (value.to(dtype) for value in weights)
    weight = base.weight if in_fp8 else frozen.pop(0)
    bias = None if base.bias is None else frozen.pop(0)
    return _LoRAProduct.apply(x.to(dtype), weight, base.scale if in_fp8 else None, bias, a_RI, b_OR, scale)


class _LoRAProduct(torch.autograd.Function):
    """The product and its gradients; W and b are frozen and get none. `scale_O1` are the scales of a W in FP8."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        scale_O1: Tensor | None,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        h_NR = x_NI @ a_RI.T
        if scale != 1:
            h_NR *= scale
        if scale_O1 is not None:
            y_NO = fp8_product(x_NI, weight_OI, scale_O1, bias_O)
        else:
            y_NO = x_NI @ weight_OI.T if bias_O is None else torch.addmm(bias_O, x_NI, weight_OI.T)
        y_NO.addmm_(h_NR, b_OR.T)
        ctx.save_for_backward(x_NI, h_NR, weight_OI, scale_O1, a_RI, b_OR)
        ctx.scale, ctx.shape = scale, x.shape
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, h_NR, weight_OI, scale_O1, a_RI, b_OR = ctx.saved_tensors
        y_NO = gradients[0].reshape(len(x_NI), -1)
        gradient_NR = y_NO @ b_OR
        if ctx.scale != 1:
            gradient_NR *= ctx.scale
        x = None
        if ctx.needs_input_grad[0]:
            weight_OI = weight_OI if scale_O1 is None else dequantized(weight_OI, scale_O1, y_NO.dtype)
            x = (y_NO @ weight_OI).addmm_(gradient_NR, a_RI).view(ctx.shape)
        return x, None, None, None, gradient_NR.T @ x_NI, y_NO.T @ h_NR, None
