"""Queries, keys and values of an attention, from the projections of its streams: norms, RoPE, and one sequence.

On a GPU one kernel for each stream writes its tokens into the attention's sequence, and one its gradients into those of
the projection. The norms and the rotation are computed in float32.

Shape suffixes: B batch, S tokens of a sequence, H heads, K features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.fused.use import applies, in_rows, launch, steps, trial_numbers
from models.rotary import Rotary

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, (B, S, H, K)."""


class ProjectedTokens(NamedTuple):
    """The projection of a stream's tokens, and the norms of its queries and keys, if it has some."""

    qkv: Tensor
    """(B, S, 3 · H · K): queries, keys and values of all heads."""
    norm_q: nn.RMSNorm | None = None
    norm_k: nn.RMSNorm | None = None

    def split(self, heads: int) -> Heads:
        """Return the stream's queries and keys, normalised, and values."""
        q, k, v = self.qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        return self.norm_q(q) if self.norm_q else q, self.norm_k(k) if self.norm_k else k, v


def attention(streams: Sequence[ProjectedTokens], heads: int, rotary: Rotary) -> Tensor:
    """Attend from all tokens of all streams to all of them, with RoPE on queries and keys; return (B, S, H·K)."""
    q_BHSK, k_BHSK, v_BHSK = (each_BSHK.transpose(1, 2) for each_BSHK in turned_heads(streams, heads, rotary))
    return F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK).transpose(1, 2).flatten(2)


def turned_heads(streams: Sequence[ProjectedTokens], heads: int, rotary: Rotary) -> Heads:
    """Return the heads of all streams' tokens, one stream after the other, with RoPE on queries and keys."""
    weights = [norm.weight for stream in streams for norm in (stream.norm_q, stream.norm_k) if norm is not None]
    projections = [stream.qkv for stream in streams]
    if _fits(projections, weights, heads, rotary) and applies(_trial, *projections, *weights):
        return _by_kernels(streams, heads, rotary)
    return _plain(streams, heads, rotary)


def _fits(projections: Sequence[Tensor], weights: Sequence[Tensor], heads: int, rotary: Rotary) -> bool:
    """Whether the kernels' assumptions hold: one dtype, all streams with norms or none, and an angle for each token."""
    angles = (sum(value.shape[1] for value in projections), 1, projections[0].shape[-1] // (3 * heads))
    alike = len({(value.dtype, len(value), value.shape[-1]) for value in projections}) == 1
    return alike and len(weights) in (0, 2 * len(projections)) and rotary.cos_S1K.shape == angles


def _plain(streams: Sequence[ProjectedTokens], heads: int, rotary: Rotary) -> Heads:
    if len(streams) == 1 and streams[0].norm_q is None:
        qk, v = streams[0].qkv.unflatten(-1, (3 * heads, -1)).split((2 * heads, heads), 2)
    else:
        qk, v = _joined(streams, heads)
    q, k = rotary.turn(qk).type_as(v).chunk(2, 2)
    return q, k, v


def _joined(streams: Sequence[ProjectedTokens], heads: int) -> tuple[Tensor, Tensor]:
    """Return the queries and keys of all streams' tokens, as heads of one tensor, and the values."""
    parts = zip(*(stream.split(heads) for stream in streams), strict=True)
    q, k, v = (torch.cat(values, 1) if len(values) > 1 else values[0] for values in parts)
    return torch.cat((q, k), 2), v


def _by_kernels(streams: Sequence[ProjectedTokens], heads: int, rotary: Rotary) -> Heads:
    norm = streams[0].norm_q
    eps = 0.0 if norm is None else norm.eps or torch.finfo(norm.weight.dtype).eps
    weights = [each.weight for stream in streams for each in (stream.norm_q, stream.norm_k) if each is not None]
    return _TurnHeads.apply(heads, eps, *rotary, len(streams), *(stream.qkv for stream in streams), *weights)


_PLAIN = 5
"""Arguments of `_TurnHeads` before those with gradients."""


class _TurnHeads(torch.autograd.Function):
    """The heads of the streams' projections; `weights` are those of the streams' norms, or none."""

    @staticmethod
    def forward(
        ctx: Any, heads: int, eps: float, cos_S1K: Tensor, sin_S1K: Tensor, count: int, *values: Tensor
    ) -> Heads:
        projections, weights = [in_rows(value) for value in values[:count]], values[count:]
        first, width = projections[0], projections[0].shape[-1] // (3 * heads)
        lengths = [value.shape[1] for value in projections]
        q, k, v = (first.new_empty(len(first), sum(lengths), heads, width) for _ in range(3))
        ctx.heads, ctx.eps, ctx.count, ctx.lengths = heads, eps, count, lengths
        kept = projections if weights else [value.new_empty(0) for value in projections]
        ctx.save_for_backward(cos_S1K, sin_S1K, *kept, *weights)
        for index, (qkv, start) in enumerate(zip(projections, _starts(lengths), strict=True)):
            norms = weights[2 * index : 2 * index + 2] or (qkv, qkv)
            sizes = (*steps(qkv), start, sum(lengths), heads, width, eps)
            flags = {"NORMS": bool(weights), **_blocks(heads, width)}
            launch("turn_heads", (lengths[index], len(qkv)), qkv, *norms, cos_S1K, sin_S1K, q, k, v, *sizes, **flags)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradients = tuple(map(in_rows, gradients))
        cos_S1K, sin_S1K, *values = ctx.saved_tensors
        of_projections: list[Tensor] = []
        of_weights: list[Tensor | None] = []
        for index, qkv in enumerate(values[: ctx.count]):
            weights = values[ctx.count + 2 * index :][:2]
            wanted = any(ctx.needs_input_grad[_PLAIN + ctx.count + 2 * index :][:2])
            result, sums = _turned_back(ctx, index, gradients, (qkv, *weights), (cos_S1K, sin_S1K), wanted=wanted)
            of_projections.append(result)
            found = [sums[:, place].sum(0).to(each.dtype) for place, each in enumerate(weights)] if wanted else []
            of_weights += found or [None] * len(weights)
        return *(None,) * _PLAIN, *of_projections, *of_weights


def _turned_back(
    ctx: Any, index: int, gradients: tuple[Tensor, ...], values: tuple[Tensor, ...], angles: Any, *, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of a stream's projection, and sums (B · S, 2, K) whose sums are those of its norms' weights.

    `values` are the projection and the weights of its norms; without norms the projection is not needed.
    """
    heads, tokens, (batch, _, _, width) = ctx.heads, ctx.lengths[index], gradients[0].shape
    result = gradients[0].new_empty(batch, tokens, 3 * heads * width)
    sums = result.new_empty((batch * tokens, 2, width) if wanted else (1, 1, 1), dtype=torch.float32)
    norms = len(values) > 1
    qkv, *weights = values if norms else (result,) * 3
    strides = (*(step for value in gradients for step in value.stride()[:3]), *steps(qkv))
    sizes = (*strides, _starts(ctx.lengths)[index], tokens, heads, width, ctx.eps)
    flags = {"NORMS": norms, "SUMS": wanted, **_blocks(heads, width)}
    launch("turn_heads_backward", (tokens, batch), *gradients, qkv, *weights, *angles, result, sums, *sizes, **flags)
    return result, sums


def _starts(lengths: Sequence[int]) -> list[int]:
    """Return the place of each stream's first token in the sequence."""
    return [sum(lengths[:index]) for index in range(len(lengths))]


def _blocks(heads: int, width: int) -> dict[str, int]:
    """Return the sizes of a program: powers of two."""
    return {"HEADS": 1 << (heads - 1).bit_length(), "WIDTH": 1 << (width - 1).bit_length()}


def _trial(device: torch.device, dtype: torch.dtype, fused: bool) -> tuple[Tensor, ...]:
    """See `applies`."""
    numbers = partial(trial_numbers, device=device, dtype=dtype)
    rotary = Rotary.at(torch.arange(7, device=device), torch.linspace(0.1, 1, 5, device=device))
    norms = [nn.RMSNorm(10, eps=1e-6, device=device) for _ in range(4)]
    latent, text = numbers(2, 5, 90), numbers(2, 2, 90)
    streams = ProjectedTokens(latent, *norms[:2]), ProjectedTokens(text, *norms[2:])
    results = (_by_kernels if fused else _plain)(streams, 3, rotary)
    loss = torch.stack([value.float().square().sum() for value in results]).sum()
    return *results, *torch.autograd.grad(loss, (latent, text, *(norm.weight for norm in norms)))
