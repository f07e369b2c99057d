"""Samplers: they solve the probability-flow ODE from noise to data, for any formulation of diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    solver = Solver(diffusion, steps=steps, sampler=sampler)
    state = solver.begin(noise)
    for done in range(steps):
        state = solver.step(network, state, done)
        if progress is not None:
            progress(done + 1, steps)
    return state[0]


State = tuple[Tensor, ...]
"""What one step leaves to the next: x, and what the sampler remembers of the step before; all (B, C, T)."""


class Solver:
    """The steps that `sample` takes, one at a time.

    The network alone relates a frame to other frames. So a part of x may be steps ahead of the rest, and states may be
    cut and joined along T between steps; `models.wavefront` relies on that.

    Attributes:
        levels: the noise levels of the schedule, one more than there are steps.

    Raises:
        ValueError: the sampler is unknown, or ``steps`` is less than 1.
    """

    def __init__(self, diffusion: Diffusion, *, steps: int, sampler: str) -> None:
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler '{sampler}': choose one of {', '.join(SAMPLERS)}")
        self._diffusion, self._step = diffusion, SAMPLERS[sampler]
        self.levels = _levels(diffusion, steps)

    def begin(self, noise: Tensor) -> State:
        """Return the state before the first step, for standard gaussian ``noise`` (B, C, T)."""
        return (self._diffusion.initial(noise.to(torch.promote_types(noise.dtype, torch.float32))),)

    @torch.no_grad()
    def step(self, network: Network, state: State, done: int) -> State:
        """Take a step after ``done`` earlier ones; return the new state."""

        def denoise(x: Tensor, level: Level) -> Tensor:
            return self._diffusion.denoise(network, x, x.new_full((len(x),), level.t))

        return self._step(denoise, state, self.levels, done)


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


def _levels(diffusion: Diffusion, steps: int) -> list[Level]:
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
Step = Callable[[Denoise, State, Sequence[Level], int], State]
"""Takes a state from one level of the schedule to the next; the number counts the steps already done."""


def _euler(denoise: Denoise, state: State, levels: Sequence[Level], done: int) -> State:
    (x,), (here, there) = state, levels[done : done + 2]
    return (_transfer(x, denoise(x, here), here, there),)


def _heun(denoise: Denoise, state: State, levels: Sequence[Level], done: int) -> State:
    """Run algorithm 1 of Karras et al. 2022: average the slopes at both ends of a step; the last step is Euler's."""
    (x,), (here, there) = state, levels[done : done + 2]
    x0 = denoise(x, here)
    guess = _transfer(x, x0, here, there)
    if there.sigma == 0:
        return (guess,)
    slope = _increment(x, x0, here, here, there)
    slope_there = _increment(guess, denoise(guess, there), there, here, there)
    return (x + (slope + slope_there) / 2,)


def _increment(x: Tensor, x0: Tensor, at: Level, here: Level, there: Level) -> Tensor:
    """Return the increment of x from ``here`` to ``there`` along the ODE's slope for ``x`` and ``x0`` at ``at``."""
    noise = (x - at.alpha * x0) / at.sigma
    return (there.alpha - here.alpha) * x0 + (there.sigma - here.sigma) * noise


def _dpmpp(denoise: Denoise, state: State, levels: Sequence[Level], done: int) -> State:
    """Run DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, algorithm 2): extrapolate x0 in λ to the step's middle.

    At alpha = 0 and at sigma = 0, λ is infinite and x0 can't be extrapolated, so the step is of order 1. The state
    holds the previous step's x0 from the second step on.
    """
    x, (here, there) = state[0], levels[done : done + 2]
    x0 = denoise(x, here)
    x0_middle = x0
    if done and levels[done - 1].alpha > 0 and there.sigma > 0:
        half_ratio = (there.log_snr - here.log_snr) / (here.log_snr - levels[done - 1].log_snr) / 2
        x0_middle = x0 + half_ratio * (x0 - state[1])
    return _transfer(x, x0_middle, here, there), x0


SAMPLERS: dict[str, Step] = {
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
    return decode_steps(GuidedSteps(diffusion, sampling), dit, noise_BCT, conditions, progress=progress)


class DecodingSteps(Protocol):
    """The steps in which D samples x0 from noise, one at a time. States may be cut and joined, as a `Solver`'s may."""

    steps: int
    """Number of steps."""

    def begin(self, noise_BCT: Tensor) -> State:
        """Return the state before the first step, for standard gaussian noise."""

    def step(self, dit: Callable[..., Tensor], conditions: Mapping[str, Tensor], state: State, done: int) -> State:
        """Take a step after `done` earlier ones with D and its conditions; return the new state."""


class GuidedSteps:
    """The steps of a sampler, with guidance and temperature."""

    def __init__(self, diffusion: Diffusion, sampling: Sampling) -> None:
        self._solver = Solver(diffusion, steps=sampling.steps, sampler=sampling.sampler)
        self._sampling, self.steps = sampling, sampling.steps

    def begin(self, noise_BCT: Tensor) -> State:
        """Return the state before the first step."""
        return self._solver.begin(self._sampling.temperature * noise_BCT)

    def step(self, dit: Callable[..., Tensor], conditions: Mapping[str, Tensor], state: State, done: int) -> State:
        """Take a step after `done` earlier ones."""
        return self._solver.step(network_of(dit, conditions, guidance=self._sampling.guidance), state, done)


@torch.no_grad()
def decode_steps(
    steps: DecodingSteps,
    dit: Callable[..., Tensor],
    noise_BCT: Tensor,
    conditions: Mapping[str, Tensor],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Take all the steps from noise (B, C, T) to x0; the other arguments are those of `generate`."""
    state = steps.begin(noise_BCT)
    for done in range(steps.steps):
        state = steps.step(dit, conditions, state, done)
        if progress is not None:
            progress(done + 1, steps.steps)
    return state[0]


def network_of(dit: Callable[..., Tensor], conditions: Mapping[str, Tensor], *, guidance: float) -> Network:
    """Bind the conditions to D, with classifier-free guidance if there are any; the arguments are `generate`'s."""

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return dit(x, t, **conditions)

    def unconditional(x: Tensor, t: Tensor) -> Tensor:
        return dit(x, t)

    return guided(conditional, unconditional, guidance if conditions else 1.0)
