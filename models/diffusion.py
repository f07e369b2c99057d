"""Two formulations of diffusion behind one interface, and the samplers that work with either.

Both are paths ``x_t = alpha(t) · x0 + sigma(t) · noise`` from the data to gaussian noise. What differs is the meaning
of ``t``, what the network is fed, and what it predicts. A network here is any callable of ``x (B, C, T)`` and
``t (B,)`` that returns ``(B, C, T)``, its conditions already bound: nothing in this file knows of text, z or a DiT.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]


class Diffusion(ABC):
    """A path from data to noise, and what a network has to learn to walk it back.

    Tensors of data are ``(B, C, T)`` and levels ``t`` are ``(B,)``, one a sample. A level of 0 is free of noise.
    """

    name: ClassVar[str]

    @abstractmethod
    def noise_level(self, u: Tensor) -> Tensor:
        """Training's level at the quantile ``u`` (B,) in (0, 1): the inverse CDF, so equal bins of u fill equally."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha, sigma)``, shaped as ``t``, with ``x_t = alpha · x0 + sigma · noise``; both are linear in ``t``."""

    @abstractmethod
    def predict(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's raw output for the corrupted ``x_t``, its inputs scaled as the formulation has it."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What :meth:`predict` ought to return."""

    @abstractmethod
    def denoise(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's estimate of ``x0`` (B, C, T), in the precision of ``x_t``."""

    @abstractmethod
    def schedule(self, steps: int) -> Tensor:
        """Sampling's levels, ``(steps + 1,)`` in float64 on the CPU, decreasing, the last one exactly 0.

        Raises:
            ValueError: fewer than one step.
        """

    @abstractmethod
    def initial(self, noise: Tensor) -> Tensor:
        """Where sampling starts: ``x`` at the schedule's first level, made of standard gaussian ``noise``."""

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t``, the data ``x0`` (B, C, T) at the levels ``t`` (B,)."""
        alpha, sigma = self.coefficients(t)
        return _per_sample(alpha) * x0 + _per_sample(sigma) * noise

    def loss(self, network: Network, x0: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        """Squared error of the network's prediction, a mean over C and T for each sample: ``(B,)`` in float32.

        ``mask`` (B, T) is true (or 1) where a frame counts; a sample without any such frame has a loss of 0.
        """
        x0, noise, t = x0.float(), noise.float(), t.float()
        prediction = self.predict(network, self.corrupt(x0, noise, t), t)
        error_BT = (prediction - self.target(x0, noise, t)).square().mean(dim=1)
        if mask is None:
            return error_BT.mean(dim=1)
        mask = mask.to(error_BT.dtype)
        return (error_BT * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)


@dataclass(frozen=True)
class FlowMatching(Diffusion):
    """Rectified flow: a straight line from data (t = 0) to noise (t = 1), of which the network predicts the velocity.

    The velocity points at the data, ``v = x0 - noise``, as in the Woosh release; so ``x0 = x_t + t · v``. Training's t
    is logit-normal (Esser et al. 2024, arXiv 2403.03206, section 3.1).
    """

    logit_mean: float = 0.0
    """Mean of logit(t) in training; above 0 the noisier half is seen more."""
    logit_std: float = 1.0
    """Standard deviation of logit(t) in training."""

    name: ClassVar[str] = "flow_matching"

    def __post_init__(self) -> None:
        _require_positive(self, "logit_std")

    def noise_level(self, u: Tensor) -> Tensor:
        """``sigmoid(logit_mean + logit_std · probit(u))``."""
        return torch.sigmoid(self.logit_mean + self.logit_std * _probit(u))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``1 - t`` and ``t``."""
        return 1 - t, t

    def predict(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity that the network gives for ``x_t`` and ``t`` as they are."""
        return network(x_t, t)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity ``x0 - noise``, the same at every t."""
        return x0 - noise

    def denoise(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """``x_t + t · v``."""
        return x_t + _per_sample(t) * self.predict(network, x_t, t)

    def schedule(self, steps: int) -> Tensor:
        """Evenly spaced from 1 to 0."""
        return torch.linspace(1, 0, _checked(steps) + 1, dtype=torch.float64)

    def initial(self, noise: Tensor) -> Tensor:
        """The noise itself: at t = 1 nothing is left of x0."""
        return noise


@dataclass(frozen=True)
class EDM(Diffusion):
    """Karras et al. 2022 (arXiv 2206.00364): noise added to data of full size, t = σ, and a preconditioned network F.

    The denoiser is ``D(x; σ) = c_skip · x + c_out · F(c_in · x; c_noise)`` (equation 7). S-PRESSO's objective
    ``E‖D(x0 + σε) - x0‖²`` is weighted here by ``λ(σ) = 1 / c_out²`` (table 1), which makes it a plain squared error of
    F at every σ (equation 8).
    """

    sigma_data: float = 1.0
    """Standard deviation of x0; latents are standardised, so 1."""
    log_mean: float = -0.5
    """Mean of ln σ in training: the paper's -1.2 for σ_data = 0.5, moved to σ_data = 1 (by ln 2)."""
    log_std: float = 1.2
    """Standard deviation of ln σ in training."""
    sigma_min: float = 0.002
    """The last level of sampling before 0."""
    sigma_max: float = 80.0
    """The level at which sampling starts."""
    rho: float = 7.0
    """How much the levels of sampling crowd towards sigma_min (equation 5)."""

    name: ClassVar[str] = "edm"

    def __post_init__(self) -> None:
        _require_positive(self, "sigma_data", "log_std", "sigma_min", "rho")
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"edm: sigma_max={self.sigma_max} must be above sigma_min={self.sigma_min}")

    def noise_level(self, u: Tensor) -> Tensor:
        """Log-normal: ``exp(log_mean + log_std · probit(u))``."""
        return torch.exp(self.log_mean + self.log_std * _probit(u))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 and ``t``: the noise grows and the data stays."""
        return torch.ones_like(t), t

    def c_skip(self, sigma: Tensor) -> Tensor:
        """Share of the input that passes the network by (table 1)."""
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        """Scale of F's output (table 1)."""
        return sigma * self.sigma_data * torch.rsqrt(sigma**2 + self.sigma_data**2)

    def c_in(self, sigma: Tensor) -> Tensor:
        """Scale that gives the network's input unit variance (table 1)."""
        return torch.rsqrt(sigma**2 + self.sigma_data**2)

    def c_noise(self, sigma: Tensor) -> Tensor:
        """What the network is told of the level (table 1); finite at σ = 0, for which it is told sigma_min."""
        return sigma.clamp_min(self.sigma_min).log() / 4

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """λ(σ) (table 1), which :meth:`loss` holds implicitly, being the error of F rather than of D."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def predict(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """``F(c_in · x_t; c_noise)``."""
        return network(_per_sample(self.c_in(t)) * x_t, self.c_noise(t))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The bracket of equation 8, ``(x0 - c_skip · x_t) / c_out``."""
        # with x_t = x0 + σ · noise put in, σ cancels: no division by it, and exact at 0
        x0_share = t * torch.rsqrt(t**2 + self.sigma_data**2) / self.sigma_data
        noise_share = self.sigma_data * torch.rsqrt(t**2 + self.sigma_data**2)
        return _per_sample(x0_share) * x0 - _per_sample(noise_share) * noise

    def denoise(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """``D(x_t; t)`` (equation 7)."""
        prediction = self.predict(network, x_t, t)
        return _per_sample(self.c_skip(t)) * x_t + _per_sample(self.c_out(t)) * prediction

    def schedule(self, steps: int) -> Tensor:
        """From sigma_max to sigma_min by equation 5, then 0."""
        ramp = torch.linspace(0, 1, _checked(steps), dtype=torch.float64)
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigmas = (first + ramp * (last - first)) ** self.rho
        return torch.cat([sigmas, sigmas.new_zeros(1)])

    def initial(self, noise: Tensor) -> Tensor:
        """The noise at sigma_max, beside which x0 is nothing."""
        return self.sigma_max * noise


FORMULATIONS: dict[str, type[Diffusion]] = {kind.name: kind for kind in (FlowMatching, EDM)}


def make_diffusion(name: str, **options: float) -> Diffusion:
    """The formulation called ``name`` ("flow_matching" or "edm"); ``options`` are the fields of its class.

    Raises:
        ValueError: an unknown name or option, or an option out of its range.
    """
    if name not in FORMULATIONS:
        raise ValueError(f"unknown diffusion '{name}': choose one of {', '.join(FORMULATIONS)}")
    kind = FORMULATIONS[name]
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # every formulation is a dataclass
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"diffusion '{name}' has no option '{option}': it has {', '.join(known)}")
        if not isinstance(value, int | float):
            raise ValueError(f"{name}: {option}={value!r} must be a number")
    return kind(**options)


def guided(conditional: Network, unconditional: Network, scale: float) -> Network:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): past the conditional network by ``scale``.

    D is affine in the prediction for either formulation, so guiding the one guides the other. A scale of 1 is the
    conditional network itself, at its price.
    """
    if scale == 1:
        return conditional

    def network(x: Tensor, t: Tensor) -> Tensor:
        without = unconditional(x, t)
        return without + scale * (conditional(x, t) - without)

    return network


# --- sampling ---------------------------------------------------------------------------------------------------------


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


# --- small things -----------------------------------------------------------------------------------------------------


def _per_sample(t: Tensor) -> Tensor:
    return t[:, None, None]


def _probit(u: Tensor) -> Tensor:
    """The standard normal's inverse CDF, finite where rounding has made a uniform number 0 or 1."""
    tiny = torch.finfo(u.dtype).eps / 2
    return torch.special.ndtri(u.clamp(tiny, 1 - tiny))


def _checked(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"sampling takes at least 1 step, not {steps}")
    return steps


def _require_positive(diffusion: Diffusion, *names: str) -> None:
    for name in names:
        value = getattr(diffusion, name)
        if not value > 0:
            raise ValueError(f"{diffusion.name}: {name}={value} must be above 0")
