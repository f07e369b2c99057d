"""Formulations of diffusion behind one interface.

All are paths ``x_t = alpha(t) · x0 + sigma(t) · noise`` from the data to gaussian noise. What differs is the meaning
of ``t``, what the network is fed, and what it predicts. A network here is any callable of ``x (B, C, T)`` and
``t (B,)`` that returns ``(B, C, T)``, its conditions already bound: nothing in this file knows of text, z or a DiT.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
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
    def x0_of(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of ``x0`` (B, C, T) that a raw output of the network for ``x_t`` stands for."""

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

    def denoise(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's estimate of ``x0`` (B, C, T), in the precision of ``x_t``."""
        return self.x0_of(self.predict(network, x_t, t), x_t, t)

    def prediction(self, network: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Prediction:
        """What the network makes of ``x0`` (B, C, T) under ``noise`` at the levels ``t`` (B,), in float32."""
        x0, noise, t = x0.float(), noise.float(), t.float()
        x_t = self.corrupt(x0, noise, t)
        return Prediction(self, self.predict(network, x_t, t), self.target(x0, noise, t), x_t, t)

    def loss(self, network: Network, x0: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of training: see :meth:`Prediction.squared_error`."""
        return self.prediction(network, x0, noise, t).squared_error(mask)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network made of noised data, beside what it ought to have made; loss terms are computed from it."""

    diffusion: Diffusion
    output: Tensor
    """The network's raw output, ``(B, C, T)``."""
    target: Tensor
    """What ``output`` ought to be."""
    x_t: Tensor
    """The noised data that the network saw, before the formulation scaled it."""
    t: Tensor
    """Noise levels, ``(B,)``."""

    @property
    def x0(self) -> Tensor:
        """The estimate of ``x0`` that the output stands for, ``(B, C, T)``, with a gradient."""
        return self.diffusion.x0_of(self.output, self.x_t, self.t)

    def squared_error(self, mask: Tensor | None = None) -> Tensor:
        """Squared error of the output, a mean over C and T for each sample: ``(B,)`` in float32.

        ``mask`` (B, T) is true (or 1) where a frame counts; a sample without any such frame has an error of 0.
        """
        error_BT = (self.output - self.target).square().mean(dim=1)
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

    def x0_of(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``x_t + t · v``."""
        return x_t + _per_sample(t) * output

    def schedule(self, steps: int) -> Tensor:
        """Evenly spaced from 1 to 0."""
        return torch.linspace(1, 0, _checked(steps) + 1, dtype=torch.float64)

    def initial(self, noise: Tensor) -> Tensor:
        """The noise itself: at t = 1 nothing is left of x0."""
        return noise


class VarianceExploding(Diffusion):
    """Karras et al. 2022 (arXiv 2206.00364): noise added to data of full size, t = σ, and a preconditioned network F.

    The denoiser is ``D(x; σ) = c_skip · x + c_out · F(c_in · x; c_noise)`` (equation 7). S-PRESSO's objective
    ``E‖D(x0 + σε) - x0‖²`` is weighted here by ``λ(σ) = 1 / c_out²`` (table 1), which makes it a plain squared error of
    F at every σ (equation 8).
    """

    sigma_data: float
    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        _require_positive(self, "sigma_data", "sigma_min")
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"{self.name}: sigma_max={self.sigma_max} must be above sigma_min={self.sigma_min}")

    @abstractmethod
    def c_noise(self, sigma: Tensor) -> Tensor:
        """What the network is told of the level."""

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

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """λ(σ) (table 1), which the squared error holds implicitly, being the error of F rather than of D."""
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

    def x0_of(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``D(x_t; t)`` of F's output (equation 7)."""
        return _per_sample(self.c_skip(t)) * x_t + _per_sample(self.c_out(t)) * output

    def initial(self, noise: Tensor) -> Tensor:
        """The noise at sigma_max, beside which x0 is nothing."""
        return self.sigma_max * noise


@dataclass(frozen=True)
class EDM(VarianceExploding):
    """The formulation of Karras et al. 2022 with their noise levels, in training and in sampling."""

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
        super().__post_init__()
        _require_positive(self, "log_std", "rho")

    def noise_level(self, u: Tensor) -> Tensor:
        """Log-normal: ``exp(log_mean + log_std · probit(u))``."""
        return torch.exp(self.log_mean + self.log_std * _probit(u))

    def c_noise(self, sigma: Tensor) -> Tensor:
        """``ln σ / 4`` (table 1); finite at σ = 0, for which it is told sigma_min."""
        return sigma.clamp_min(self.sigma_min).log() / 4

    def schedule(self, steps: int) -> Tensor:
        """From sigma_max to sigma_min by equation 5, then 0."""
        ramp = torch.linspace(0, 1, _checked(steps), dtype=torch.float64)
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigmas = (first + ramp * (last - first)) ** self.rho
        return torch.cat([sigmas, sigmas.new_zeros(1)])


@dataclass(frozen=True)
class VPrediction(VarianceExploding):
    """The v-objective on a cosine path (Salimans and Ho 2022, arXiv 2202.00512), as Stable Audio Open was trained.

    On the path ``cos φ · x0 + sin φ · noise`` the network is told ``2 φ / π`` and predicts
    ``v = cos φ · noise - sin φ · x0``. Divided by cos φ, that path is this one with ``σ = tan φ`` and σ_data = 1; c_in
    scales it back, and v is -F.
    """

    sigma_data: float = 1.0
    """Standard deviation of x0."""
    sigma_min: float = 0.3
    """The last level of sampling before 0; the release's."""
    sigma_max: float = 500.0
    """The level at which sampling starts, and the highest that is trained at; the release's."""

    name: ClassVar[str] = "v_prediction"

    def noise_level(self, u: Tensor) -> Tensor:
        """``tan φ``, with φ uniform from 0 to ``atan(sigma_max)``."""
        return torch.tan(_inside(u) * math.atan(self.sigma_max))

    def c_noise(self, sigma: Tensor) -> Tensor:
        """``2 φ / π``: 0 where there is no noise, 1 where there is nothing else."""
        return torch.atan(sigma) * (2 / math.pi)

    def c_out(self, sigma: Tensor) -> Tensor:
        """Scale of v."""
        return -super().c_out(sigma)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v."""
        return -super().target(x0, noise, t)

    def schedule(self, steps: int) -> Tensor:
        """Evenly spaced in ln σ from sigma_max to sigma_min, then 0."""
        ends = math.log(self.sigma_max), math.log(self.sigma_min)
        sigmas = torch.linspace(*ends, _checked(steps), dtype=torch.float64).exp()
        return torch.cat([sigmas, sigmas.new_zeros(1)])


FORMULATIONS: dict[str, type[Diffusion]] = {kind.name: kind for kind in (FlowMatching, EDM, VPrediction)}


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

    D is affine in the prediction for every formulation, so guiding the one guides the other. A scale of 1 is the
    conditional network itself, at its price.
    """
    if scale == 1:
        return conditional

    def network(x: Tensor, t: Tensor) -> Tensor:
        without = unconditional(x, t)
        return without + scale * (conditional(x, t) - without)

    return network


# --- small things -----------------------------------------------------------------------------------------------------


def _per_sample(t: Tensor) -> Tensor:
    return t[:, None, None]


def _probit(u: Tensor) -> Tensor:
    """The standard normal's inverse CDF, finite everywhere."""
    return torch.special.ndtri(_inside(u))


def _inside(u: Tensor) -> Tensor:
    """Within (0, 1), where rounding has made a uniform number 0 or 1."""
    tiny = torch.finfo(u.dtype).eps / 2
    return u.clamp(tiny, 1 - tiny)


def _checked(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"sampling takes at least 1 step, not {steps}")
    return steps


def _require_positive(diffusion: Diffusion, *names: str) -> None:
    for name in names:
        value = getattr(diffusion, name)
        if not value > 0:
            raise ValueError(f"{diffusion.name}: {name}={value} must be above 0")
