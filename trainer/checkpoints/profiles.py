"""Power-function profiles of averages, and how stored averages combine to another profile (arXiv 2312.02696).

An average at the time t has the profile p(τ) = (γ + 1) τ^γ / t^(γ + 1) over the weights at the times τ in [0, t]. Its
relative width σ_rel is the profile's standard deviation divided by t. Time is the number of samples seen; any other
unit gives the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

WIDEST = 0.288
"""The largest relative width: just below 1 / √12, which the exponent 0 gives."""

_CUTOFF = 1e-12
"""Singular values below this fraction of the largest are left out: stored averages are nearly dependent."""

Floats = npt.NDArray[np.float64]


class Profile(NamedTuple):
    """The profile of an average that was stored at a time."""

    width: float
    """Relative width σ_rel."""
    time: float
    """Samples seen when the average was stored."""


class Combination(NamedTuple):
    """A weighted sum of stored averages that comes close to an average with another profile."""

    factors: list[float]
    """The factor of each stored average; their sum is 1."""
    error: float
    """L2 distance of the sum's profile from the wanted one, relative to the norm of the wanted one."""


@cache
def exponent(width: float) -> float:
    """Return γ of a relative width: the positive root of (γ + 1) = σ² (γ + 2)² (γ + 3)."""
    roots = np.roots([1.0, 7.0, 16.0 - width**-2, 12.0 - width**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6))


def combine(stored: Sequence[Profile], wanted: Profile) -> Combination:
    """Return the combination of stored averages that is nearest to a wanted one in the least-squares sense.

    The time of each stored average is above 0 and at most that of the wanted one.
    """
    exponents = np.array([exponent(each.width) for each in stored])
    times = np.array([each.time for each in stored]) / wanted.time
    target = np.array([exponent(wanted.width)]), np.array([1.0])
    products = _inner_products(exponents[:, None], times[:, None], exponents[None], times[None])
    onto_target = _inner_products(exponents, times, *target)
    factors = np.linalg.lstsq(products, onto_target, rcond=_CUTOFF)[0]
    factors /= factors.sum()  # weights that do not change have to stay as they are
    norm = float(_inner_products(*target, *target)[0])
    distance = norm - 2 * float(factors @ onto_target) + float(factors @ products @ factors)
    return Combination(factors.tolist(), (max(0.0, distance) / norm) ** 0.5)


def _inner_products(exponent_1: Floats, time_1: Floats, exponent_2: Floats, time_2: Floats) -> Floats:
    """Return ∫ p₁ p₂ of pairs of profiles (the paper's appendix C), in logarithms because the powers are large."""
    first, total = np.minimum(time_1, time_2), exponent_1 + exponent_2 + 1
    powers = total * np.log(first) - (exponent_1 + 1) * np.log(time_1) - (exponent_2 + 1) * np.log(time_2)
    result: Floats = (exponent_1 + 1) * (exponent_2 + 1) / total * np.exp(powers)
    return result
