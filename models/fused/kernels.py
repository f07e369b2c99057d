"""The kernels, in Triton's language; `models.fused.norm` and `models.fused.heads` say what they compute.

All of them compute in float32, whatever the dtypes of the tensors. Tensors have the strides that are passed, their last
dimension lies together in memory, and outputs are contiguous. No kernel adds in an order that changes from run to run.

Triton comes with torch's CUDA builds and compiles a kernel at its first use, which also needs a C compiler.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_norm(
    x,
    y,
    gate,
    shift,
    scale,
    total,
    out,
    means,
    roots,
    x_sample,
    x_token,
    y_sample,
    y_token,
    gate_sample,
    shift_sample,
    scale_sample,
    tokens,
    width,
    eps,
    ADDS: tl.constexpr,
    GATED: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program computes a token: total = x + gate · y, and the norm of total."""
    token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < width
    row = sample * tokens + token
    value = tl.load(x + sample * x_sample + token * x_token + column, mask=here, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(y + sample * y_sample + token * y_token + column, mask=here, other=0.0).to(tl.float32)
        if GATED:
            added *= tl.load(gate + sample * gate_sample + column, mask=here, other=0.0).to(tl.float32)
        rounded = (value + added).to(total.dtype.element_ty)
        tl.store(total + row * width + column, rounded, mask=here)
        value = rounded.to(tl.float32)  # what the backward pass will read
    mean = tl.sum(value, axis=0) / width
    centred = tl.where(here, value - mean, 0.0)
    root = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    tl.store(means + row, mean)
    tl.store(roots + row, root)
    factor = tl.load(scale + sample * scale_sample + column, mask=here, other=0.0).to(tl.float32) + OFFSET
    moved = tl.load(shift + sample * shift_sample + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (centred * root * factor + moved).to(out.dtype.element_ty), mask=here)


@triton.jit
def sum_norm_backward(
    out_gradient,
    total_gradient,
    total,
    means,
    roots,
    scale,
    y,
    gate,
    x_gradient,
    y_gradient,
    sums,
    out_sample,
    out_token,
    passed_sample,
    passed_token,
    total_sample,
    total_token,
    y_sample,
    y_token,
    gate_sample,
    scale_sample,
    tokens,
    width,
    PASSED: tl.constexpr,
    APART: tl.constexpr,
    GATED: tl.constexpr,
    SUMS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program computes ROWS tokens of a sample, and the sums over them that the gradients of weights consist of."""
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    factor = tl.load(scale + sample * scale_sample + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    if GATED:
        opened = tl.load(gate + sample * gate_sample + column, mask=inside, other=0.0).to(tl.float32)
    of_shift = tl.zeros((BLOCK,), tl.float32)
    of_scale = tl.zeros((BLOCK,), tl.float32)
    of_gate = tl.zeros((BLOCK,), tl.float32)
    for index in range(ROWS):
        token = (part * ROWS + index).to(tl.int64)
        here = inside & (token < tokens)
        row = sample * tokens + token
        mean = tl.load(means + row, mask=token < tokens, other=0.0)
        root = tl.load(roots + row, mask=token < tokens, other=0.0)
        value = tl.load(total + sample * total_sample + token * total_token + column, mask=here, other=0.0)
        normal = tl.where(here, (value.to(tl.float32) - mean) * root, 0.0)
        gradient = tl.load(out_gradient + sample * out_sample + token * out_token + column, mask=here, other=0.0)
        gradient = gradient.to(tl.float32)
        scaled = gradient * factor
        level, slope = tl.sum(scaled, axis=0) / width, tl.sum(scaled * normal, axis=0) / width
        result = root * (scaled - level - normal * slope)
        if PASSED:
            place = total_gradient + sample * passed_sample + token * passed_token + column
            result += tl.load(place, mask=here, other=0.0).to(tl.float32)
        tl.store(x_gradient + row * width + column, result.to(x_gradient.dtype.element_ty), mask=here)
        if APART:
            of_y = result
            if GATED:
                of_y *= opened
            tl.store(y_gradient + row * width + column, of_y.to(y_gradient.dtype.element_ty), mask=here)
        if SUMS:
            of_shift += gradient
            of_scale += gradient * normal
            if GATED:
                added = tl.load(y + sample * y_sample + token * y_token + column, mask=here, other=0.0)
                of_gate += tl.where(here, result, 0.0) * added.to(tl.float32)
    if SUMS:
        first = sums + (sample * tl.num_programs(0) + part) * 3 * width + column
        tl.store(first, of_shift, mask=inside)
        tl.store(first + width, of_scale, mask=inside)
        tl.store(first + 2 * width, of_gate, mask=inside)


@triton.jit
def turn_heads(
    qkv,
    weight_q,
    weight_k,
    cosine,
    sine,
    q,
    k,
    v,
    qkv_sample,
    qkv_token,
    first,
    all_tokens,
    heads,
    width,
    eps,
    NORMS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program computes all heads of a token."""
    token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    here = (head < heads) & (column < width)
    source = qkv + sample * qkv_sample + token * qkv_token
    target = (sample * all_tokens + first + token) * heads * width
    angle = (first + token) * width
    cosine += angle
    sine += angle
    _turn(source, weight_q, cosine, sine, q + target, head, column, here, width, eps, NORMS)
    _turn(source + heads * width, weight_k, cosine, sine, k + target, head, column, here, width, eps, NORMS)
    place = head * width + column
    tl.store(v + target + place, tl.load(source + 2 * heads * width + place, mask=here), mask=here)


@triton.jit
def _turn(source, weight, cosine, sine, target, head, column, here, width, eps, NORMS: tl.constexpr):
    """Normalise and rotate one token's queries, or keys; the other feature of a pair is the column with its last bit
    changed."""
    value = tl.load(source + head * width + column, mask=here, other=0.0).to(tl.float32)
    other = tl.load(source + head * width + (column ^ 1), mask=here, other=0.0).to(tl.float32)
    inside = column < width
    if NORMS:
        root = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + eps)[:, None]
        value *= root * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        other *= root * tl.load(weight + (column ^ 1), mask=inside, other=0.0).to(tl.float32)
    turned = value * tl.load(cosine + column, mask=inside, other=0.0)
    turned += other * tl.load(sine + column, mask=inside, other=0.0)
    tl.store(target + head * width + column, turned.to(target.dtype.element_ty), mask=here)


@triton.jit
def turn_heads_backward(
    q_gradient,
    k_gradient,
    v_gradient,
    qkv,
    weight_q,
    weight_k,
    cosine,
    sine,
    qkv_gradient,
    sums,
    q_sample,
    q_token,
    q_head,
    k_sample,
    k_token,
    k_head,
    v_sample,
    v_token,
    v_head,
    qkv_sample,
    qkv_token,
    first,
    tokens,
    heads,
    width,
    eps,
    NORMS: tl.constexpr,
    SUMS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program computes all heads of a token, and the sums over them that the gradients of weights consist of."""
    token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    here = (head < heads) & (column < width)
    source = qkv + sample * qkv_sample + token * qkv_token
    row = sample * tokens + token
    target = qkv_gradient + row * 3 * heads * width
    sums += row * 2 * width
    cosine += (first + token) * width
    sine += (first + token) * width
    from_q = q_gradient + sample * q_sample + (first + token) * q_token + head * q_head
    from_k = k_gradient + sample * k_sample + (first + token) * k_token + head * k_head
    from_v = v_gradient + sample * v_sample + (first + token) * v_token + head * v_head
    part = heads * width
    _turn_back(from_q, source, weight_q, cosine, sine, target, sums, head, column, here, width, eps, NORMS, SUMS)
    _turn_back(
        from_k, source + part, weight_k, cosine, sine, target + part, sums + width, head, column, here, width, eps,
        NORMS, SUMS,
    )  # fmt: skip
    passed = tl.load(from_v + column, mask=here, other=0.0).to(target.dtype.element_ty)
    tl.store(target + 2 * part + head * width + column, passed, mask=here)


@triton.jit
def _turn_back(
    gradient,
    source,
    weight,
    cosine,
    sine,
    target,
    sums,
    head,
    column,
    here,
    width,
    eps,
    NORMS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """The gradient of `_turn`: the opposite rotation, then the norm's."""
    inside = column < width
    here_gradient = tl.load(gradient + column, mask=here, other=0.0).to(tl.float32)
    other = tl.load(gradient + (column ^ 1), mask=here, other=0.0).to(tl.float32)
    result = here_gradient * tl.load(cosine + column, mask=inside, other=0.0)
    result += other * tl.load(sine + (column ^ 1), mask=inside, other=0.0)
    if NORMS:
        value = tl.load(source + head * width + column, mask=here, other=0.0).to(tl.float32)
        root = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + eps)[:, None]
        normal = value * root
        if SUMS:
            over_heads = tl.sum(result * normal, axis=0)[None, :]
            tl.store(sums + column, over_heads, mask=inside)
        result *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        result = root * (result - normal * (tl.sum(result * normal, axis=1) / width)[:, None])
    tl.store(target + head * width + column, result.to(target.dtype.element_ty), mask=here)
