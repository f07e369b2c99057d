"""Keyed normal numbers in one kernel of a CUDA device, bit-identical to those of `trainer.randomness`.

The plain code takes about 280 kernels for a draw. This one reads the keys, and writes the numbers.

Triton comes with torch's CUDA builds and compiles the kernel at its first use, which also needs a C compiler.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 256
"""Philox counters of a program, each of which gives four numbers."""


def fused_normal(keys_B: Tensor, numbers: int, *, atanh: list[float], sine: list[float], cosine: list[float]) -> Tensor:
    """Draw float32 (B, numbers), standard normal; the series of the three functions begin with the constant."""
    out = torch.empty(len(keys_B), numbers, device=keys_B.device)
    counters = -(-numbers // 4)
    grid = (triton.cdiv(counters, _WORDS), len(keys_B))
    series = {"ATANH": tuple(atanh), "SINE": tuple(sine), "COSINE": tuple(cosine)}
    # Without fusion, each product and each sum is rounded, as on a CPU.
    _normal[grid](keys_B, out, counters, numbers, **series, WORDS=_WORDS, enable_fp_fusion=False)
    return out


@triton.jit
def _normal(
    keys,
    out,
    counters,
    numbers,
    ATANH: tl.constexpr,
    SINE: tl.constexpr,
    COSINE: tl.constexpr,
    WORDS: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    counter = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    key = tl.load(keys + sample)
    key0, key1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    zero = (counter * 0).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox_impl(counter.to(tl.uint32), zero, zero, zero, zero + key0, zero + key1)
    first = out + sample * numbers
    _store_pair(first, word0, word2, counter, 0, counters, numbers, ATANH, SINE, COSINE)
    _store_pair(first, word1, word3, counter, 2, counters, numbers, ATANH, SINE, COSINE)


@triton.jit
def _store_pair(
    first,
    radius_word,
    angle_word,
    counter,
    quarter: tl.constexpr,
    counters,
    numbers,
    ATANH: tl.constexpr,
    SINE: tl.constexpr,
    COSINE: tl.constexpr,
):
    """Write two normals for each two words (Box and Muller), into two quarters of a sample's numbers."""
    radius = tl.sqrt_rn(_log((radius_word.to(tl.float32) + 0.5) * 2.0**-32, ATANH) * -2.0)
    half_angle = (angle_word ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.float32) * _HALF_TURN
    square = half_angle * half_angle
    sine = _polynomial(square, SINE) * half_angle
    cosine = _polynomial(square, COSINE)
    place, here = quarter * counters + counter, counter < counters
    tl.store(first + place, cosine * sine * 2.0 * radius, mask=here & (place < numbers))
    place += counters
    tl.store(first + place, (sine * sine * -2.0 + 1.0) * radius, mask=here & (place < numbers))


@triton.jit
def _log(x, ATANH: tl.constexpr):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = tl.div_rn(mantissa - 1.0, mantissa + 1.0)
    return _polynomial(s * s, ATANH) * s * 2.0 + exponent.to(tl.float32) * _LN2


@triton.jit
def _polynomial(x, SERIES: tl.constexpr):
    result = x * 0.0 + SERIES[len(SERIES) - 1]
    for k in tl.static_range(1, len(SERIES)):
        result = result * x + SERIES[len(SERIES) - 1 - k]
    return result


_HALF_TURN = tl.constexpr(math.pi * 2.0**-32)
_LN2 = tl.constexpr(math.log(2.0))
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
