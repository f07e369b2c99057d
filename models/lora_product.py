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


def lora_linear(x: Tensor, base: torch.nn.Linear, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor | None:
    """Return `base(x) + scale · B A x` in the dtype that autocast gives matrix products, or in x's without autocast.

    Returns None where the function does not apply: the weights have several dtypes and autocast is off, or they are cut
    among ranks and gathered by hooks on modules (ZeRO-3).
    """
    device = x.device.type
    weights = (base.weight, a_RI, b_OR) if base.bias is None else (base.weight, base.bias, a_RI, b_OR)
    if any(hasattr(weight, "ds_id") for weight in weights):
        return None
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif all(weight.dtype == x.dtype for weight in weights):
        dtype = x.dtype
    else:
        return None
    weight, *rest = (value.to(dtype) for value in weights)
    bias, a_RI, b_OR = (None, *rest) if base.bias is None else rest
    return _LoRAProduct.apply(x.to(dtype), weight, bias, a_RI, b_OR, scale)


class _LoRAProduct(torch.autograd.Function):
    """The product and its gradients; W and b are frozen and get none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        h_NR = x_NI @ a_RI.T
        if scale != 1:
            h_NR *= scale
        y_NO = x_NI @ weight_OI.T if bias_O is None else torch.addmm(bias_O, x_NI, weight_OI.T)
        y_NO.addmm_(h_NR, b_OR.T)
        ctx.save_for_backward(x_NI, h_NR, weight_OI, a_RI, b_OR)
        ctx.scale, ctx.shape = scale, x.shape
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, h_NR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        y_NO = gradients[0].reshape(len(x_NI), -1)
        gradient_NR = y_NO @ b_OR
        if ctx.scale != 1:
            gradient_NR *= ctx.scale
        x = None
        if ctx.needs_input_grad[0]:
            x = (y_NO @ weight_OI).addmm_(gradient_NR, a_RI).view(ctx.shape)
        return x, None, None, gradient_NR.T @ x_NI, y_NO.T @ h_NR, None
