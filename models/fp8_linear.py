"""Linear layers with frozen weights in FP8: half the bytes of bf16, and faster products on GPUs that multiply FP8.

The weights are quantized once, each output channel with a scale of its own; x is quantized in each product, each row
with a scale of its own. A scale maps the largest magnitude of its row to 448, the largest number of e4m3:

    W_oi ≈ s_o q_oi    s_o = max_i |W_oi| / 448    q in float8_e4m3fn
    (W x + b)_no ≈ s_n s_o Σ_i q_ni q_oi + b_o

The gradient with respect to x is g W in g's dtype, with W multiplied out for this product alone. A second FP8 copy of W
in the layout that this product wants would take back the memory saved, and would need the gradient in FP8 too.

Shape suffixes: N rows of x, I inputs, O outputs, R rows, C columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.float32_buffers import Float32Buffers

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_SMALLEST_SCALE = 1e-12  # of a row of zeros, which stays zero
_MULTIPLE = 16  # `torch._scaled_mm` takes widths that are multiples of this
_CAPABILITY = (8, 9)  # Ada; Hopper and Blackwell have larger ones


class Held(NamedTuple):
    """How many linear layers were converted, and how many were left because of their shape."""

    converted: int
    left: int


class FP8Linear(Float32Buffers):
    """A frozen linear layer in FP8. Its weights are buffers, which keep their dtypes when a model is converted."""

    weight: Tensor
    """q, float8_e4m3fn (O, I)."""
    scale: Tensor
    """s, float32 (O, 1)."""

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        """Quantize the weights of a linear layer on a device, where the result stays. The layer is unchanged."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight_OI, scale_O1 = quantized(linear.weight.detach().to(device))
        self.register_buffer("weight", weight_OI)
        self.register_buffer("scale", scale_O1)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b in the dtype that autocast gives matrix products, or in x's without autocast."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _Product.apply(x.to(dtype), self.weight, self.scale, self.bias)


def hold_in_fp8(dit: nn.Module, device: torch.device) -> Held:
    """Replace the frozen linear layers in D's `blocks`, and those outside that carry a LoRA, by `FP8Linear`s.

    The layers are converted one by one on a device, where they stay; their former weights are given up. Layers whose
    inputs or outputs are not a multiple of 16 are left as they are, and so are the few outside the blocks: they hold
    hardly any weights, and D reads the dtype of its computation from them.
    """
    places = [  # without the layers themselves, whose weights are to be freed one by one
        (parent, name)
        for path, parent in dit.named_modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad
        if name == "base_layer" or "blocks" in path.split(".")
    ]
    converted = 0
    for parent, name in places:
        layer: Any = getattr(parent, name)
        if layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0:
            setattr(parent, name, FP8Linear(layer, device))
            converted += 1
    return Held(converted, len(places) - converted)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a device can multiply FP8 with a scale for each row: GPUs from Ada on, and, slowly, any CPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _CAPABILITY


def quantized(value_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row with its own scale; return q in FP8 (R, C), row-major, and the scales in float32 (R, 1)."""
    value_RC = value_RC.contiguous()
    largest_R1 = torch.linalg.vector_norm(value_RC, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    scale_R1 = largest_R1.div_(_LARGEST).clamp_min_(_SMALLEST_SCALE)
    return (value_RC / scale_R1).to(FP8), scale_R1


def dequantized(weight_RC: Tensor, scale_R1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return s q in a dtype (R, C)."""
    return weight_RC.to(dtype).mul_(scale_R1)


def fp8_product(x_NI: Tensor, weight_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return W x + b (N, O) in x's dtype, after quantizing the rows of x; no autograd."""
    q_NI, scale_N1 = quantized(x_NI)
    y_NO = torch._scaled_mm(
        q_NI,
        weight_OI.T,
        scale_N1,
        scale_O1.T,
        bias=None if bias_O is None else bias_O.to(torch.bfloat16),
        out_dtype=torch.bfloat16,  # the only one with scales for each row on a GPU
        use_fast_accum=True,  # its rounding is far below that of q, and it is as usual in forward passes
    )
    return y_NO.to(x_NI.dtype)


class _Product(torch.autograd.Function):
    """The product and its gradient with respect to x; nothing of x is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI, scale_O1)
        ctx.shape = x.shape
        y_NO = fp8_product(x.reshape(-1, x.shape[-1]), weight_OI, scale_O1, bias_O)
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, scale_O1 = ctx.saved_tensors
        y_NO = gradients[0].reshape(-1, len(weight_OI))
        x_NI = y_NO @ dequantized(weight_OI, scale_O1, y_NO.dtype)
        return x_NI.view(ctx.shape), None, None, None
