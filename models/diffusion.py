"""Formulations of diffusion behind one interface.

Each formulation is a path ``x_t = alpha(t) · x0 + sigma(t) · noise`` from the data to gaussian noise. Formulations
differ in the meaning of ``t``, in the network's inputs, and in what the network predicts. A network is any callable
``(x (B, C, T), t (B,)) → (B, C, T)`` whose conditions are already bound, so this file is independent of text, z and D.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from models.ranges import range_of, range_problems, ranged

Network = Callable[[Tensor, Tensor], Tensor]


class Diffusion(ABC):
    """A path from data to noise, and the network's training target for reversing it.

    Data is ``(B, C, T)``. Noise levels ``t`` are ``(B,)``, one per sample; level 0 is free of noise.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Raise ValueError if an option is out of its range."""
        options = [(field, range_of(field)) for field in fields(self)]  # type: ignore[arg-type]  # all are dataclasses
        found = [
            line
            for field, allowed in options
            if allowed is not None
            for line in range_problems(f"{self.name}: {field.name}", getattr(self, field.name), allowed)
        ]
        if found:
            raise ValueError("; ".join(found))

    @abstractmethod
    def noise_level(self, u: Tensor) -> Tensor:
        """Return the noise levels at the quantiles ``u`` (B,) of training's distribution, where 0 < u < 1."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(alpha, sigma)`` of ``x_t = alpha · x0 + sigma · noise`` in the shape of ``t``; both are linear in
        ``t``."""

    @abstractmethod
    def predict(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """Scale the inputs as the formulation requires, and return the network's raw output for ``x_t``."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the value that :meth:`predict` is trained to return."""

    @abstractmethod
    def x0_of(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert the network's raw output for ``x_t`` to its estimate of ``x0`` (B, C, T)."""

    @abstractmethod
    def schedule(self, steps: int) -> Tensor:
        """Return the sampler's noise levels ``(steps + 1,)``: float64 on the CPU, decreasing, the last one exactly 0.

        Raises:
            ValueError: ``steps`` is less than 1.
        """

    @abstractmethod
    def initial(self, noise: Tensor) -> Tensor:
        """Scale standard gaussian ``noise`` to ``x`` at the schedule's first level, where sampling starts."""

    def corrupt(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Add ``noise`` to the data ``x0`` (B, C, T) at the noise levels ``t`` (B,); return ``x_t``."""
        alpha, sigma = self.coefficients(t)
        return _per_sample(alpha) * x0 + _per_sample(sigma) * noise

    def denoise(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the network's estimate of ``x0`` (B, C, T) in the dtype of ``x_t``."""
        return self.x0_of(self.predict(network, x_t, t), x_t, t)

    def prediction(self, network: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Prediction:
        """Corrupt ``x0`` (B, C, T) with ``noise`` at the noise levels ``t`` (B,) and run the network, in float32."""
        x0, noise, t = x0.float(), noise.float(), t.float()
        x_t = self.corrupt(x0, noise, t)
        return Prediction(self, self.predict(network, x_t, t), self.target(x0, noise, t), x_t, t)

    def loss(self, network: Network, x0: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the training loss ``(B,)``; see :meth:`Prediction.squared_error`."""
        return self.prediction(network, x0, noise, t).squared_error(mask)


@dataclass(frozen=True, eq=False)
class Prediction:
    """A network's output for noised data together with its target; loss terms are computed from both."""

    diffusion: Diffusion
    output: Tensor
    """The network's raw output, ``(B, C, T)``."""
    target: Tensor
    """The value that ``output`` is trained towards, ``(B, C, T)``."""
    x_t: Tensor
    """The noised data ``(B, C, T)``, before the formulation scaled it for the network."""
    t: Tensor
    """Noise levels, ``(B,)``."""

    @property
    def x0(self) -> Tensor:
        """The estimate of ``x0`` that the output implies, ``(B, C, T)``, with a gradient."""
        return self.diffusion.x0_of(self.output, self.x_t, self.t)

    def squared_error(self, mask: Tensor | None = None) -> Tensor:
        """Return each sample's squared error, averaged over C and T: ``(B,)`` in float32.

        ``mask`` (B, T) is true (or 1) for the frames to average over; a sample without such a frame has an error of 0.
        """
        error_BT = (self.output - self.target).square().mean(dim=1)
        if mask is None:
            return error_BT.mean(dim=1)
        mask = mask.to(error_BT.dtype)
        return (error_BT * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)


@dataclass(frozen=True)
class FlowMatching(Diffusion):
    """Rectified flow: the network predicts the velocity on a straight line from data (t = 0) to noise (t = 1).

    The velocity points from noise to data, ``v = x0 - noise``, as in the Woosh release; so ``x0 = x_t + t · v``. In
    training, t is logit-normal (Esser et al. 2024, arXiv 2403.03206, section 3.1).
    """

    logit_mean: float = ranged(0.0)
    """Mean of logit(t) in training; a mean above 0 draws high noise levels more often than low ones."""
    logit_std: float = ranged(1.0, above=0)
    """Standard deviation of logit(t) in training."""

    name: ClassVar[str] = "flow_matching"

    def noise_level(self, u: Tensor) -> Tensor:
        """Return ``sigmoid(logit_mean + logit_std · probit(u))``."""
        return torch.sigmoid(self.logit_mean + self.logit_std * _probit(u))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``1 - t`` and ``t``."""
        return 1 - t, t

    def predict(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity that the network predicts from the unscaled ``x_t`` and ``t``."""
        return network(x_t, t)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the velocity ``x0 - noise``, which does not depend on ``t``."""
        return x0 - noise

    def x0_of(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return ``x_t + t · v``."""
        return x_t + _per_sample(t) * output

    def schedule(self, steps: int) -> Tensor:
        """Return evenly spaced levels from 1 to 0."""
        return torch.linspace(1, 0, _require_steps(steps) + 1, dtype=torch.float64)

    def initial(self, noise: Tensor) -> Tensor:
        """Return ``noise`` itself, because x_t contains nothing of x0 at t = 1."""
        return noise


class VarianceExploding(Diffusion):
    """Noise of level t = σ on unscaled data, with a preconditioned network F (Karras et al. 2022, arXiv 2206.00364).

    The denoiser is ``D(x; σ) = c_skip · x + c_out · F(c_in · x; c_noise)`` (equation 7). Weighting S-PRESSO's objective
    ``E‖D(x0 + σε) - x0‖²`` by ``λ(σ) = 1 / c_out²`` (table 1) makes it the plain squared error of F at every σ
    (equation 8).
    """

    sigma_data: float
    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"{self.name}: sigma_max={self.sigma_max} must be above sigma_min={self.sigma_min}")

    @abstractmethod
    def c_noise(self, sigma: Tensor) -> Tensor:
        """Return the network's noise-level input for ``sigma`` (B,)."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 and ``t``: only the noise is scaled, never the data."""
        return torch.ones_like(t), t

    def c_skip(self, sigma: Tensor) -> Tensor:
        """Return the scale of the skip connection around the network (table 1)."""
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        """Return the scale of F's output (table 1)."""
        return sigma * self.sigma_data * torch.rsqrt(sigma**2 + self.sigma_data**2)

    def c_in(self, sigma: Tensor) -> Tensor:
        """Return the scale that gives the network's input unit variance (table 1)."""
        return torch.rsqrt(sigma**2 + self.sigma_data**2)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Return λ(σ) (table 1). :meth:`loss` contains this weight already, as it is the error of F, not of D."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def predict(self, network: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """Return ``F(c_in · x_t; c_noise)``."""
        return network(_per_sample(self.c_in(t)) * x_t, self.c_noise(t))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return F's target of equation 8, ``(x0 - c_skip · x_t) / c_out``."""
        # After inserting x_t = x0 + σ · noise, σ cancels, so nothing is divided by σ and the target is exact at σ = 0.
        x0_share = t * torch.rsqrt(t**2 + self.sigma_data**2) / self.sigma_data
        noise_share = self.sigma_data * torch.rsqrt(t**2 + self.sigma_data**2)
        return _per_sample(x0_share) * x0 - _per_sample(noise_share) * noise

    def x0_of(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return ``D(x_t; t)`` for F's output (equation 7)."""
        return _per_sample(self.c_skip(t)) * x_t + _per_sample(self.c_out(t)) * output

    def initial(self, noise: Tensor) -> Tensor:
        """Return ``sigma_max · noise``, next to which x0 is negligible."""
        return self.sigma_max * noise


@dataclass(frozen=True)
class EDM(VarianceExploding):
    """The formulation of Karras et al. 2022, with their noise levels for training and for sampling."""

    sigma_data: float = ranged(1.0, above=0)
    """Standard deviation of x0; latents are standardised, so 1."""
    log_mean: float = ranged(-0.5)
    """Mean of ln σ in training: the paper's -1.2 for σ_data = 0.5, shifted by ln 2 for σ_data = 1."""
    log_std: float = ranged(1.2, above=0)
    """Standard deviation of ln σ in training."""
    sigma_min: float = ranged(0.002, above=0)
    """Lowest noise level of sampling above 0."""
    sigma_max: float = ranged(80.0, above=0)
    """Noise level at which sampling starts."""
    rho: float = ranged(7.0, above=0)
    """Exponent of sampling's schedule: the higher, the denser the levels near sigma_min (equation 5)."""

    name: ClassVar[str] = "edm"

    def noise_level(self, u: Tensor) -> Tensor:
        """Return the log-normal ``exp(log_mean + log_std · probit(u))``."""
        return torch.exp(self.log_mean + self.log_std * _probit(u))

    def c_noise(self, sigma: Tensor) -> Tensor:
        """Return ``ln σ / 4`` (table 1); σ is clamped to at least sigma_min to keep the value finite at σ = 0."""
        return sigma.clamp_min(self.sigma_min).log() / 4

    def schedule(self, steps: int) -> Tensor:
        """Return levels from sigma_max to sigma_min by equation 5, then 0."""
        ramp = torch.linspace(0, 1, _require_steps(steps), dtype=torch.float64)
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigmas = (first + ramp * (last - first)) ** self.rho
        return torch.cat([sigmas, sigmas.new_zeros(1)])


@dataclass(frozen=True)
class VPrediction(VarianceExploding):
    """The v-objective on a cosine path (Salimans and Ho 2022, arXiv 2202.00512), which Stable Audio Open uses.

    On the path ``cos φ · x0 + sin φ · noise``, the network gets ``2 φ / π`` as its noise level and predicts
    ``v = cos φ · noise - sin φ · x0``. Dividing that path by cos φ gives the variance-exploding path with
    ``σ = tan φ`` and σ_data = 1; c_in undoes the division, and v = -F.
    """

    sigma_data: float = ranged(1.0, above=0)
    """Standard deviation of x0."""
    sigma_min: float = ranged(0.3, above=0)
    """Lowest noise level of sampling above 0, as in the release."""
    sigma_max: float = ranged(500.0, above=0)
    """Noise level at which sampling starts, and the highest in training; as in the release."""

    name: ClassVar[str] = "v_prediction"

    def noise_level(self, u: Tensor) -> Tensor:
        """Return ``tan φ``, where φ is uniform from 0 to ``atan(sigma_max)``."""
        return torch.tan(_clamp_to_open_interval(u) * math.atan(self.sigma_max))

    def c_noise(self, sigma: Tensor) -> Tensor:
        """Return ``2 φ / π``: 0 without noise, 1 for pure noise."""
        return torch.atan(sigma) * (2 / math.pi)

    def c_out(self, sigma: Tensor) -> Tensor:
        """Return the scale of v."""
        return -super().c_out(sigma)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return v."""
        return -super().target(x0, noise, t)

    def schedule(self, steps: int) -> Tensor:
        """Return levels that are evenly spaced in ln σ from sigma_max to sigma_min, then 0."""
        ends = math.log(self.sigma_max), math.log(self.sigma_min)
        sigmas = torch.linspace(*ends, _require_steps(steps), dtype=torch.float64).exp()
        return torch.cat([sigmas, sigmas.new_zeros(1)])


FORMULATIONS: dict[str, type[Diffusion]] = {kind.name: kind for kind in (FlowMatching, EDM, VPrediction)}


def make_diffusion(name: str, **options: float) -> Diffusion:
    """Build the formulation called ``name``, a key of ``FORMULATIONS``; ``options`` set the fields of its class.

    Raises:
        ValueError: ``name`` or an option is unknown, or an option is out of its range.
    """
    if name not in FORMULATIONS:
        raise ValueError(f"unknown diffusion '{name}': choose one of {', '.join(FORMULATIONS)}")
    kind = FORMULATIONS[name]
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # every formulation is a dataclass
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"diffusion '{name}' has no option '{option}': its options are {', '.join(known)}")
        if not isinstance(value, int | float):
            raise ValueError(f"{name}: {option}={value!r} must be a number")
    return kind(**options)


def guided(conditional: Network, unconditional: Network, scale: float) -> Network:
    """Combine two networks by classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

    The estimate of x0 is affine in the network's output for every formulation, so guiding the output guides x0. A
    scale of 1 returns the conditional network itself and does not call the unconditional one.
    """
    if scale == 1:
        return conditional

    def network(x: Tensor, t: Tensor) -> Tensor:
        without = unconditional(x, t)
        return without + scale * (conditional(x, t) - without)

    return network


# --- helpers ----------------------------------------------------------------------------------------------------------


def _per_sample(t: Tensor) -> Tensor:
    return t[:, None, None]


def _probit(u: Tensor) -> Tensor:
    """Return the standard normal's inverse CDF at ``u``; finite even if ``u`` is 0 or 1."""
    return torch.special.ndtri(_clamp_to_open_interval(u))


def _clamp_to_open_interval(u: Tensor) -> Tensor:
    """Clamp ``u`` to the open interval (0, 1), as rounding can make a uniform random number 0 or 1."""
    tiny = torch.finfo(u.dtype).eps / 2
    return u.clamp(tiny, 1 - tiny)


def _require_steps(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, not {steps}")
    return steps
