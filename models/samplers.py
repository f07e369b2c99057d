"""Samplers: they solve the probability-flow ODE from noise to data, for any formulation of diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from models.diffusion import Diffusion, Network, guided
from models.sizes import Sampling


@torch.no_grad()
def sample(
    diffusion: Diffusion,
    network: Network,
    noise: Tensor,
    *,
    steps: int,
    sampler: str,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Solve the probability-flow ODE from standard gaussian ``noise`` (B, C, T) to ``x0``; this is deterministic.

    Args:
        diffusion: the formulation that the network was trained with.
        network: the network, with its conditions bound.
        noise: standard gaussian noise, which the formulation scales. Half precision is converted to float32.
        steps: intervals of the schedule; "heun" calls the network ``2 · steps - 1`` times, the others ``steps`` times.
        sampler: "euler" (order 1), "heun" (order 2) or "dpmpp" (DPM-Solver++ 2M, order 2 with one call per step).
        progress: called after every step with (steps done, steps).

    Raises:
        ValueError: the sampler is unknown, or ``steps`` is less than 1.
    """
    states = trajectory(diffusion, network, noise, levels=levels_of(diffusion, steps), sampler=sampler)
    x = next(states)
    for done in range(1, steps + 1):
        x = next(states)
        if progress is not None:
            progress(done, steps)
    return x


def trajectory(
    diffusion: Diffusion, network: Network, noise: Tensor, *, levels: Sequence[Level], sampler: str
) -> Iterator[Tensor]:
    """Yield x at each level of a schedule, which `levels_of` returns, on the way of `sample`.

    Raises:
        ValueError: the sampler is unknown.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler '{sampler}': choose one of {', '.join(SAMPLERS)}")
    x = diffusion.initial(noise.to(torch.promote_types(noise.dtype, torch.float32)))

    def denoise(x: Tensor, level: Level) -> Tensor:
        return diffusion.denoise(network, x, x.new_full((len(x),), level.t))

    yield x
    yield from SAMPLERS[sampler](denoise, x, levels)


@dataclass(frozen=True)
class Level:
    """One noise level of a schedule, as Python floats, so that no step waits for the device."""

    t: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """λ = ln(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
        return math.log(self.alpha / self.sigma)


def levels_of(diffusion: Diffusion, steps: int) -> list[Level]:
    """Return the levels of the formulation's schedule. Raises ValueError if `steps` is less than 1."""
    t = diffusion.schedule(steps)
    alpha, sigma = diffusion.coefficients(t)
    return [Level(*numbers) for numbers in zip(t.tolist(), alpha.tolist(), sigma.tolist(), strict=True)]


def _transfer(x: Tensor, x0: Tensor, here: Level, there: Level) -> Tensor:
    """Step from level ``here`` to ``there``, assuming a constant estimate ``x0``; the noise in ``x`` is only rescaled.

    This is the first-order step of DDIM and DPM-Solver++. It is Euler's step, too, because alpha and sigma are linear
    in t.
    """
    ratio = there.sigma / here.sigma
    return ratio * x + (there.alpha - ratio * here.alpha) * x0


Denoise = Callable[[Tensor, Level], Tensor]


def _euler(denoise: Denoise, x: Tensor, levels: Sequence[Level]) -> Iterator[Tensor]:
    for here, there in pairwise(levels):
        x = _transfer(x, denoise(x, here), here, there)
        yield x


def _heun(denoise: Denoise, x: Tensor, levels: Sequence[Level]) -> Iterator[Tensor]:
    """Run algorithm 1 of Karras et al. 2022: average the slopes at both ends of a step; the last step is Euler's."""
    for here, there in pairwise(levels):
        x0 = denoise(x, here)
        guess = _transfer(x, x0, here, there)
        if there.sigma > 0:
            slope = _increment(x, x0, here, here, there)
            slope_there = _increment(guess, denoise(guess, there), there, here, there)
            guess = x + (slope + slope_there) / 2
        x = guess
        yield x


def _increment(x: Tensor, x0: Tensor, at: Level, here: Level, there: Level) -> Tensor:
    """Return the increment of x from ``here`` to ``there`` along the ODE's slope for ``x`` and ``x0`` at ``at``."""
    noise = (x - at.alpha * x0) / at.sigma
    return (there.alpha - here.alpha) * x0 + (there.sigma - here.sigma) * noise


def _dpmpp(denoise: Denoise, x: Tensor, levels: Sequence[Level]) -> Iterator[Tensor]:
    """Run DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, algorithm 2): extrapolate x0 in λ to the step's middle.

    At alpha = 0 and at sigma = 0, λ is infinite and x0 can't be extrapolated, so the step is of order 1.
    """
    previous: tuple[Level, Tensor] | None = None
    for here, there in pairwise(levels):
        x0 = denoise(x, here)
        x0_middle = x0
        if previous is not None and previous[0].alpha > 0 and there.sigma > 0:
            previous_level, previous_x0 = previous
            half_ratio = (there.log_snr - here.log_snr) / (here.log_snr - previous_level.log_snr) / 2
            x0_middle = x0 + half_ratio * (x0 - previous_x0)
        x = _transfer(x, x0_middle, here, there)
        previous = here, x0
        yield x


SAMPLERS: dict[str, Callable[[Denoise, Tensor, Sequence[Level]], Iterator[Tensor]]] = {
    "euler": _euler,
    "heun": _heun,
    "dpmpp": _dpmpp,
}


def generate(
    dit: Callable[..., Tensor],
    diffusion: Diffusion,
    noise_BCT: Tensor,
    conditions: Mapping[str, Tensor],
    *,
    sampling: Sampling,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample x0 (B, C, T) from D, starting from noise (B, C, T).

    Args:
        dit: D, called as `dit(x, t, **conditions)`.
        diffusion: the formulation that D was trained with.
        noise_BCT: standard gaussian noise.
        conditions: D's conditions by the names of its arguments; empty for an unconditional sample. Classifier-free
            guidance compares D with all conditions to D without any.
        sampling: sampler, steps, guidance and temperature.
        progress: called after every step with (steps done, steps).
    """
    network = guided_dit(dit, conditions, sampling.guidance)
    noise_BCT = sampling.temperature * noise_BCT
    return sample(diffusion, network, noise_BCT, steps=sampling.steps, sampler=sampling.sampler, progress=progress)


def guided_dit(dit: Callable[..., Tensor], conditions: Mapping[str, Tensor], guidance: float) -> Network:
    """Bind D's conditions, and guide D with all of them away from D without any, by this scale."""

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return dit(x, t, **conditions)

    def unconditional(x: Tensor, t: Tensor) -> Tensor:
        return dit(x, t)

    return guided(conditional, unconditional, guidance if conditions else 1.0)
