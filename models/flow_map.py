"""Flow maps: one call of D goes from a noise level t to a lower one r, however far apart they are.

A flow map predicts the average velocity ``u(x_t, t, r) = (x_t - x_r) / (t - r)`` on the way of the probability-flow ODE
from t to r (MeanFlow, arXiv 2505.13447), where D predicts the velocity at t itself. Both are written here as the
estimate of x0 that they imply, because alpha and sigma are linear in t in every formulation: the one with which a
single step of Euler's from t arrives at x_r. At r = t that is D's own estimate, so a D that does not know r is a flow
map of steps that are short, and D can be trained on from there in its own formulation.

D learns of r through a shift of the embedding of t, which starts at zero.

Shape suffixes: B clips, C channels of x0, T frames, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.diffusion import Diffusion, Network

NetworkTo = Callable[[Tensor, Tensor], Network]
"""Maps levels t (B,) and r (B,) to the network for steps from t to r."""

_OCTAVES = 8
_HIDDEN = 256


class SecondTime(nn.Module):
    """Embeds a step from one noise level to another as a shift of D's embedding of the first, `(B, width)`.

    Levels are given as angles, so that the embedding does not depend on the formulation: 0 for data, 1 for noise.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(4 * _OCTAVES, _HIDDEN)
        self.out = nn.Linear(_HIDDEN, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, from_B: Tensor, to_B: Tensor) -> Tensor:
        """Return the shift `(B, width)` for steps between these angles."""
        octaves = math.pi * 2.0 ** torch.arange(_OCTAVES, device=from_B.device)
        angles_BF = torch.cat([from_B.float()[:, None] * octaves, to_B.float()[:, None] * octaves], 1)
        features_BF = torch.cat([angles_BF.cos(), angles_BF.sin()], 1)
        return self.out(nn.functional.silu(self.hidden(features_BF.type_as(self.hidden.weight))))


def angle(diffusion: Diffusion, t_B: Tensor) -> Tensor:
    """Return the share of noise at the levels t as an angle between 0 (data) and 1 (noise), `(B,)`."""
    alpha, sigma = diffusion.coefficients(t_B)
    return torch.atan2(sigma, alpha) * (2 / math.pi)


def step(diffusion: Diffusion, x0: Tensor, x_t: Tensor, t_B: Tensor, r_B: Tensor) -> Tensor:
    """Step from x_t (B, C, T) at the levels t to the levels r, with a flow map's estimate of x0; return x_r."""
    ratio, share = _shares(diffusion, t_B, r_B)
    return ratio * x_t + share * x0


def x0_of_step(diffusion: Diffusion, x_t: Tensor, x_r: Tensor, t_B: Tensor, r_B: Tensor) -> Tensor:
    """Return the estimate of x0 (B, C, T) with which `step` goes from x_t to x_r, where r < t: a flow map's target."""
    ratio, share = _shares(diffusion, t_B, r_B)
    return (x_r - ratio * x_t) / share


def output_of(diffusion: Diffusion, x0: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
    """Return the network's raw output that stands for an estimate of x0 (B, C, T) at the levels t above 0."""
    # The estimate is affine in the output, in every formulation.
    offset = diffusion.x0_of(torch.zeros_like(x_t), x_t, t_B)
    scale = diffusion.x0_of(torch.ones_like(x_t[:, :1, :1]), torch.zeros_like(x_t[:, :1, :1]), t_B)
    return (x0 - offset) / scale


def levels(diffusion: Diffusion, schedule_steps: int, steps: int) -> list[float]:
    """Return the levels of few steps, `steps + 1` of those that the formulation's schedule of many steps has."""
    schedule = diffusion.schedule(schedule_steps)
    return [schedule[place].item() for place in places(schedule_steps, steps)]


def places(schedule_steps: int, steps: int) -> list[int]:
    """Return the places of `levels` in the schedule of many steps, spread evenly from its first to its last."""
    return [round(n * schedule_steps / steps) for n in range(steps + 1)]


@torch.no_grad()
def sample_flow_map(
    diffusion: Diffusion,
    network_to: NetworkTo,
    noise: Tensor,
    *,
    levels: list[float],
    renoise: Sequence[float] = (),
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Go from standard gaussian noise (B, C, T) through decreasing levels, one call of a flow map for each; return x.

    Args:
        diffusion: the formulation, whose `initial` scales the noise to the first level.
        network_to: the flow map, with its conditions bound.
        noise: standard gaussian noise.
        levels: decreasing noise levels, one more than there are steps.
        renoise: for each step, how much of its length x is first brought back up, at most to the first level, by noise
            from `generator`; empty: no noise is added on the way, and the result is a function of `noise` alone.
        generator: of the noise of `renoise`, on the device of `noise`.
        progress: called after every step with (steps done, steps).
    """
    x = start(diffusion, noise)
    for done, (here, there) in enumerate(pairwise(levels), start=1):
        if renoise and (higher := min(here + renoise[done - 1] * (here - there), levels[0])) > here:
            fresh = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x, here = renoised(diffusion, x, fresh, t_B=_same(here, x), higher_B=_same(higher, x)), higher
        x = take_step(diffusion, network_to, x, here, there)
        if progress is not None:
            progress(done, len(levels) - 1)
    return x


def start(diffusion: Diffusion, noise: Tensor) -> Tensor:
    """Scale standard gaussian noise (B, C, T) to x at the first level of a schedule, in at least float32."""
    return diffusion.initial(noise.to(torch.promote_types(noise.dtype, torch.float32)))


@torch.no_grad()
def take_step(diffusion: Diffusion, network_to: NetworkTo, x: Tensor, here: float, there: float) -> Tensor:
    """Go from x (B, C, T) at the level `here` to the level `there` with one call of a flow map; return the new x."""
    t_B, r_B = _same(here, x), _same(there, x)
    return step(diffusion, diffusion.denoise(network_to(t_B, r_B), x, t_B), x, t_B, r_B)


def renoised(diffusion: Diffusion, x: Tensor, noise: Tensor, *, t_B: Tensor, higher_B: Tensor) -> Tensor:
    """Bring x (B, C, T) from the noise levels t to higher ones, by standard gaussian noise."""
    (alpha, sigma), (alpha_higher, sigma_higher) = diffusion.coefficients(t_B), diffusion.coefficients(higher_B)
    scale = alpha_higher / alpha
    added = (sigma_higher**2 - (scale * sigma) ** 2).sqrt()
    return scale[:, None, None] * x + added[:, None, None] * noise


def _same(level: float, x: Tensor) -> Tensor:
    """Return a level for each clip of x."""
    return x.new_full((len(x),), level)


def _shares(diffusion: Diffusion, t_B: Tensor, r_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors (B, 1, 1) of x_t and of the estimate of x0 in x_r."""
    (alpha_t, sigma_t), (alpha_r, sigma_r) = diffusion.coefficients(t_B), diffusion.coefficients(r_B)
    ratio = sigma_r / sigma_t
    return ratio[:, None, None], (alpha_r - ratio * alpha_t)[:, None, None]
