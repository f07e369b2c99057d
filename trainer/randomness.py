"""Random numbers that depend on the sample alone, and not on the rank, the worker or the time of the draw.

A counter-based generator has no state: each number is a function of a key and an index. Every sample gets its own key
from (seed, purpose, counter), so its numbers are the same however a batch is split, and no state has to be saved.

Philox4x32-10 is from Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC'11). All floating-point
arithmetic here is addition, multiplication, division and square root, each rounded exactly as IEEE 754 demands; the
logarithm, sine and cosine for the normals are polynomials. The numbers are therefore bit-identical on every device.
Libraries' transcendental functions are not, and may not even give the same value at another place in a tensor.

Shapes: B is the number of samples. Use each key for one draw only: two draws with the same key share their bits.
"""

from __future__ import annotations

import hashlib
import logging
import math
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF

_LN2 = math.log(2.0)
_SQRT_HALF_BITS = 0x3F3504F3  # the float32 √½
# Taylor series, exact enough for float32: atanh(s)/s in s² for |s| ≤ 0.172; sin(x)/x and cos(x) in x² for |x| ≤ π/2.
_ATANH = [1 / (2 * k + 1) for k in range(6)]
_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(8)]
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(9)]


def keys(seed: int, purpose: str, counters: Tensor) -> Tensor:
    """Return a 64-bit key for each sample.

    Args:
        seed: the run's seed, any integer.
        purpose: the use of the numbers ("noise", "crop", …); each purpose has independent numbers.
        counters: int64 (B,), the samples' positions in the stream, or their ids.

    Returns:
        int64 (B,) on the counters' device. The chance that any two of n keys are equal is about n²/2⁶⁵.
    """
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=16).digest()
    key0, key1, high0, high1 = (int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))
    low = [counters & _MASK, (counters >> 32) & _MASK]
    high = [torch.full_like(counters, high0), torch.full_like(counters, high1)]
    word0, word1, _, _ = philox4x32(low + high, key0, key1)
    return word0 | word1 << 32


def uniform(keys: Tensor, *shape: int) -> Tensor:
    """Draw float32 (B, *shape), uniform over the 2²³ midpoints between 0 and 1, so never 0 or 1 itself."""
    out = torch.cat([word >> 9 for word in _words(keys, shape)], dim=1).float().add_(0.5).mul_(2.0**-23)
    return _shaped(out, shape)


def normal(keys: Tensor, *shape: int) -> Tensor:
    """Draw float32 (B, *shape), standard normal, |value| < 6.8 (Box and Muller 1958)."""
    if keys.device.type == "cuda" and len(keys) and math.prod(shape) and _kernel_works(keys.device):
        return _drawn_by_kernel(keys, shape)
    return _plain_normal(keys, *shape)


def _plain_normal(keys: Tensor, *shape: int) -> Tensor:
    words = _words(keys, shape)
    pairs = zip(words[:2], words[2:], strict=True)
    return _shaped(torch.cat([part for pair in pairs for part in _box_muller(*pair)], dim=1), shape)


def _drawn_by_kernel(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    from trainer.fused_normal import fused_normal

    return fused_normal(keys, math.prod(shape), atanh=_ATANH, sine=_SIN, cosine=_COS).view(len(keys), *shape)


@cache
def _kernel_works(device: torch.device) -> bool:
    """Whether Triton's kernel runs on a device and gives the plain code's numbers, tried at the first draw."""
    trial = keys(0, "trial", torch.arange(4, device=device))
    try:
        alike = torch.equal(_drawn_by_kernel(trial, (4099,)), _plain_normal(trial, 4099))
    except Exception as error:  # without Triton, a C compiler or a GPU that Triton knows
        logger.warning("noise is drawn by torch's own kernels, which take longer: Triton cannot be used (%s)", error)
        return False
    if not alike:
        logger.warning("noise is drawn by torch's own kernels, which take longer: Triton's give other numbers here")
    return alike


def integers(keys: Tensor, high: int | Tensor) -> Tensor:
    """Draw int64 (B,), uniform in [0, high) to 1 part in 2³³; `high` is one number or one per sample, 1 … 2³¹ - 1."""
    return below(high, bits(keys))


def bits(keys: Tensor) -> Tensor:
    """Draw int64 (B,), 64 random bits per key, which `below` turns into integers once their bound is known."""
    low_word, high_word, _, _ = (word[:, 0] for word in _words(keys, ()))
    return low_word | high_word << 32


def below(high: int | Tensor, bits: Tensor) -> Tensor:
    """Return `integers(keys, high)` for the keys whose `bits` (B,) these are."""
    if not bool(((torch.as_tensor(high) >= 1) & (torch.as_tensor(high) < 2**31)).all()):
        raise ValueError(f"`high` must be 1 to 2**31 - 1, not {high}")
    return ((bits >> 32 & _MASK) * high + ((bits & _MASK) * high >> 32)) >> 32


def philox4x32(counter: list[Tensor], key0: int | Tensor, key1: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10: four 32-bit words for each counter.

    Args:
        counter: four int64 tensors of one shape, each value in [0, 2³²). They are overwritten.
        key0, key1: the key's two 32-bit words, each one number or a tensor that broadcasts to the counter's shape.

    Returns:
        Four int64 tensors of the counter's shape, each value in [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    scratch = torch.empty_like(c0)
    for round_ in range(_ROUNDS):
        product0, product1 = c0.mul_(_MULTIPLIERS[0]), c2.mul_(_MULTIPLIERS[1])  # wraps, but keeps all 64 bits
        # c1 and c3 hold whole 64-bit products, of which only the low half counts; the mask removes the high half.
        for product, other, key in (
            (product1, c1, key0 + round_ * _KEY_STEPS[0]),
            (product0, c3, key1 + round_ * _KEY_STEPS[1]),
        ):
            torch.bitwise_right_shift(product, 32, out=scratch)
            other.bitwise_xor_(scratch).bitwise_xor_(key).bitwise_and_(_MASK)
        c0, c1, c2, c3 = c1, product1, c3, product0
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def _words(keys: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return four int64 tensors (B, ceil(prod(shape) / 4)) of random 32-bit words."""
    blocks = -(-math.prod(shape) // 4)
    index = torch.arange(blocks, device=keys.device).repeat(len(keys), 1)
    counter = [index, *(torch.zeros_like(index) for _ in range(3))]
    return philox4x32(counter, (keys & _MASK)[:, None], ((keys >> 32) & _MASK)[:, None])


def _shaped(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values[:, : math.prod(shape)].reshape(len(values), *shape).contiguous()


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent standard normals for two 32-bit words; overwrites `angle_word`."""
    radius = _sqrt(_log(radius_word.float().add_(0.5).mul_(2.0**-32)).mul_(-2.0))
    half_angle = angle_word.sub_(2**31).float().mul_(math.pi * 2.0**-32)
    square = half_angle * half_angle
    sine = _polynomial(square, _SIN).mul_(half_angle)
    cosine = _polynomial(square, _COS)
    # Double-angle formulas: sin 2x = 2 sin x cos x, cos 2x = 1 - 2 sin² x.
    first = cosine.mul_(sine).mul_(2.0).mul_(radius)
    second = sine.mul_(sine).mul_(-2.0).add_(1.0).mul_(radius)
    return first, second


def _sqrt(x: Tensor) -> Tensor:
    """Compute √x of float32, rounded exactly.

    With MKL, torch's float32 square root is off by a unit in the last place for a fifth of all numbers. In double
    precision such an error is far below half a unit of float32, and no root of a float32 is that near a tie.
    """
    return x.double().sqrt_().float()


def _log(x: Tensor) -> Tensor:
    """Compute log x of positive, normal float32, to a relative 1e-7: log(m·2^e) = e·log 2 + 2·atanh((m-1)/(m+1))."""
    bits = x.view(torch.int32)
    exponent = bits.sub(_SQRT_HALF_BITS).bitwise_right_shift_(23)
    mantissa = bits.sub(exponent << 23).view(torch.float32)  # in [√½, √2)
    s = (mantissa - 1.0).div_(mantissa.add_(1.0))
    return _polynomial(s * s, _ATANH).mul_(s).mul_(2.0).add_(exponent.float().mul_(_LN2))


def _polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """Evaluate a polynomial by Horner's scheme; `coefficients` begin with the constant."""
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result.mul_(x).add_(coefficient)
    return result
