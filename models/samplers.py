"""Samplers: the walk from noise to data along the probability-flow ODE, with any formulation of diffusion."""

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
    """Walk the probability-flow ODE from standard gaussian ``noise`` (B, C, T) to ``x0``, deterministically.

    Args:
        diffusion: the formulation that the network was trained with.
        network: the network, its conditions bound.
        noise: as drawn; the formulation scales it. Less than float32 is worked on in float32.
        steps: intervals of the schedule; "heun" calls the network ``2 · steps - 1`` times, the others ``steps`` times.
        sampler: "euler" (order 1), "heun" (order 2) or "dpmpp" (DPM-Solver++ 2M, order 2 at one call a step).
        progress: called after every step with (steps done, steps).

    Raises:
        ValueError: an unknown sampler, or fewer than one step.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler '{sampler}': choose one of {', '.join(SAMPLERS)}")
    levels = _levels(diffusion, steps)
    x = diffusion.initial(noise.to(torch.promote_types(noise.dtype, torch.float32)))

    def denoise(x: Tensor, level: _Level) -> Tensor:
        return diffusion.denoise(network, x, x.new_full((len(x),), level.t))

    walk = SAMPLERS[sampler](denoise, x, levels)
    for done in range(1, steps + 1):
        x = next(walk)
        if progress is not None:
            progress(done, steps)
    return x


@dataclass(frozen=True)
class _Level:
    """One level of a schedule, as numbers of the host, so that no step waits for the device."""

    t: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """λ = ln(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
        return math.log(self.alpha / self.sigma)


def _levels(diffusion: Diffusion, steps: int) -> list[_Level]:
    t = diffusion.schedule(steps)
    alpha, sigma = diffusion.coefficients(t)
    return [_Level(*numbers) for numbers in zip(t.tolist(), alpha.tolist(), sigma.tolist(), strict=True)]


def _transfer(x: Tensor, x0: Tensor, here: _Level, there: _Level) -> Tensor:
    """From ``here`` to ``there`` as if ``x0`` were the clean signal all the way: x keeps its noise, rescaled.

    The first-order step of DDIM and DPM-Solver++; as alpha and sigma are linear in t, it is Euler's step too.
    """
    ratio = there.sigma / here.sigma
    return ratio * x + (there.alpha - ratio * here.alpha) * x0


Denoise = Callable[[Tensor, _Level], Tensor]


def _euler(denoise: Denoise, x: Tensor, levels: Sequence[_Level]) -> Iterator[Tensor]:
    for here, there in pairwise(levels):
        x = _transfer(x, denoise(x, here), here, there)
        yield x


def _heun(denoise: Denoise, x: Tensor, levels: Sequence[_Level]) -> Iterator[Tensor]:
    """Algorithm 1 of Karras et al. 2022: the mean of the slopes at both ends, the last step by Euler."""
    for here, there in pairwise(levels):
        x0 = denoise(x, here)
        guess = _transfer(x, x0, here, there)
        if there.sigma > 0:
            slope = _increment(x, x0, here, here, there)
            slope_there = _increment(guess, denoise(guess, there), there, here, there)
            guess = x + (slope + slope_there) / 2
        x = guess
        yield x


def _increment(x: Tensor, x0: Tensor, at: _Level, here: _Level, there: _Level) -> Tensor:
    """What the way from ``here`` to ``there`` adds, along the direction that ``x`` and its ``x0`` give at ``at``."""
    noise = (x - at.alpha * x0) / at.sigma
    return (there.alpha - here.alpha) * x0 + (there.sigma - here.sigma) * noise


def _dpmpp(denoise: Denoise, x: Tensor, levels: Sequence[_Level]) -> Iterator[Tensor]:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, algorithm 2): x0 extrapolated in λ to the step's middle.

    Where λ is infinite, at alpha = 0 and at sigma = 0, there is nothing to extrapolate in and the step is of order 1.
    """
    before: tuple[_Level, Tensor] | None = None
    for here, there in pairwise(levels):
        x0 = denoise(x, here)
        ahead = x0
        if before is not None and before[0].alpha > 0 and there.sigma > 0:
            level_before, x0_before = before
            half_ratio = (there.log_snr - here.log_snr) / (here.log_snr - level_before.log_snr) / 2
            ahead = x0 + half_ratio * (x0 - x0_before)
        x = _transfer(x, ahead, here, there)
        before = here, x0
        yield x


SAMPLERS: dict[str, Callable[[Denoise, Tensor, Sequence[_Level]], Iterator[Tensor]]] = {
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
    """Run the sampler once: noise (B, C, T) → x0 (B, C, T).

    Args:
        dit: D, called as `dit(x, t, **conditions)`.
        diffusion: the formulation of D's weights.
        noise_BCT: standard gaussian noise.
        conditions: D's conditions by the names of its arguments; empty for an unconditional sample. Classifier-free
            guidance goes from D without any of them to D with all of them.
        sampling: sampler, steps, guidance and temperature.
        progress: called with the number of steps done and of all steps.
    """

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return dit(x, t, **conditions)

    def unconditional(x: Tensor, t: Tensor) -> Tensor:
        return dit(x, t)

    network = guided(conditional, unconditional, sampling.guidance if conditions else 1.0)
    noise_BCT = sampling.temperature * noise_BCT
    return sample(diffusion, network, noise_BCT, steps=sampling.steps, sampler=sampling.sampler, progress=progress)
