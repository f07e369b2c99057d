"""The modules that training calls: each maps `Inputs` to `Losses`. Their random numbers are keyed by sample position.

The numbers that depend on the samples' positions alone are drawn in host memory, where the positions are known, and
move to the device with the batch: a draw is a hundred operations on a few numbers each, and each would be a kernel on a
GPU. The noise is drawn on the device.

To add a loss term to a stage, give it a name in the `terms` of the stage's module.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.codec import SPresso
from models.decoder import Decoder
from models.diffusion import Prediction, make_diffusion
from trainer.inputs import Inputs
from trainer.losses import Losses
from trainer.randomness import integers, keys, normal, uniform
from trainer.recipes.schema import Config


class Objective(nn.Module):
    """A stage's module: maps a micro batch's `Inputs` to the `Losses` of its samples."""

    searches = True
    """Whether to do the work that has no gradient and depends on values: searching codes, changing gains. The memory
    plan turns it off, because the plan's tensors have shapes but no values."""

    def draws(self, positions_B: Tensor) -> dict[str, Tensor]:
        """Draw what the loss needs for samples at these positions (b,), except the noise; nothing by default."""
        return {}

    def forward(self, inputs: Inputs) -> Losses:
        """Compute the loss terms of each sample."""
        raise NotImplementedError

    def drawn(self, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return what was drawn for the samples; draw it now, on the positions' device, if that was not done before."""
        return inputs.draws or self.draws(inputs.positions)


class Denoiser(Objective):
    """Trains D to minimise E‖D(x0 + noise, condition) − x0‖² in the recipe's formulation (arXiv 2602.15082, step 1)."""

    def __init__(self, config: Config, stage: str, dit: Decoder) -> None:
        super().__init__()
        self.dit = dit
        self.diffusion = make_diffusion(config.diffusion.name, **config.diffusion.options)
        self.purpose, self.seed = stage, config.seed
        self.condition_dropout = config.stage(stage).condition_dropout

    def draws(self, positions_B: Tensor) -> dict[str, Tensor]:
        """Draw each sample's quantile of the noise level, and the key of its noise."""
        return {"level": uniform(self.keys("level", positions_B)), "noise_key": self.keys("noise", positions_B)}

    def forward(self, inputs: Inputs) -> Losses:
        """Add noise at a level drawn by each sample's key, let D predict, and compute the loss."""
        x0_BCT, draws = inputs.x0, self.drawn(inputs)
        u_B = draws["level"]
        noise_BCT = normal(draws["noise_key"], *x0_BCT.shape[1:])
        conditions = {**self.conditions(x0_BCT, draws), **inputs.conditions}
        t_B = self.diffusion.noise_level(u_B)
        prediction = self.diffusion.prediction(lambda x, t: self.dit(x, t, **conditions), x0_BCT, noise_BCT, t_B)
        return Losses(self.terms(inputs, prediction), u_B)

    def conditions(self, x0_BCT: Tensor, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the stage's own conditions, by the names of D's arguments; none by default."""
        return {}

    def terms(self, inputs: Inputs, prediction: Prediction) -> dict[str, Tensor]:
        """Compute the loss terms (b,) by name. `prediction` has D's output, its target, and the estimate of x0."""
        return {"denoising": prediction.squared_error(inputs.mask)}

    def keys(self, purpose: str, positions_B: Tensor) -> Tensor:
        """Random keys of the samples for one purpose, independent of other purposes and stages."""
        return keys(self.seed, f"{self.purpose}/{purpose}", positions_B)


class LatentDenoiser(Denoiser):
    """D conditioned on f(z), where z = g(x0), or on f(z_q) with a number of codebooks drawn for each sample."""

    def __init__(self, config: Config, stage: str, codec: SPresso, rates: list[int]) -> None:
        super().__init__(config, stage, codec.dit)
        self.g, self.f = codec.g, codec.f
        # The tuple hides the quantizer from `nn.Module`: it stays frozen, in float32 and whole on every rank.
        self.quantizers = (codec.quantizer,)
        self.rates = rates

    def draws(self, positions_B: Tensor) -> dict[str, Tensor]:
        """Draw also whether a sample keeps z, and the rows of the samples at each rate."""
        kept_B = uniform(self.keys("drop", positions_B)) >= self.condition_dropout
        rows = rows_at_rates(self.keys("rate", positions_B), self.rates) if self.rates and self.searches else {}
        return {**super().draws(positions_B), "kept": kept_B, **rows}

    def conditions(self, x0_BCT: Tensor, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute f(z), or zeros for samples whose key drops z."""
        z_BZN = self.g(x0_BCT)
        if self.rates and self.searches:
            z_BZN = self.quantized(z_BZN, draws)
        return {"condition": self.f(z_BZN) * draws["kept"][:, None, None]}

    def quantized(self, z_BZN: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """Quantize z, each sample at the rate that its key draws."""
        (quantizer,) = self.quantizers
        assert quantizer is not None
        with torch.no_grad(), torch.autocast(z_BZN.device.type, enabled=False):
            z_q = torch.empty_like(z_BZN)
            for rate, books in enumerate(self.rates):
                rows = draws[f"rate_{rate}"]
                codes_BNM = quantizer.encode(z_BZN[rows].transpose(1, 2).float(), books=books)
                z_q[rows] = quantizer.decode(codes_BNM).transpose(1, 2).to(z_q.dtype)
        return z_q


def rows_at_rates(keys_B: Tensor, rates: list[int]) -> dict[str, Tensor]:
    """Draw a rate for each sample; return the rows of the samples at rate n as `rate_n`, int64, in rising order."""
    drawn_B = integers(keys_B, len(rates))
    return {f"rate_{rate}": (drawn_B == rate).nonzero()[:, 0] for rate in range(len(rates))}


def mask_of_z(mask_BT: Tensor | None, z_BNZ: Tensor) -> Tensor:
    """Mask of the z vectors that cover at least part of a sample, not only its padding: (b, N), bool."""
    if mask_BT is None:
        return torch.ones(z_BNZ.shape[:2], dtype=torch.bool, device=z_BNZ.device)
    return mask_BT.unflatten(1, (z_BNZ.shape[1], -1)).any(2)


class Quantization(Objective):
    """The quantizer's own loss on z, of clips whose gains are changed by amounts that their keys draw."""

    def __init__(self, config: Config, stage: str, codec: SPresso) -> None:
        super().__init__()
        self.g, self.quantizer = codec.g, codec.quantizer
        self.frozen = (codec.autoencoder,)  # The tuple hides the autoencoder from `nn.Module`.
        self.gain_db, self.seed, self.purpose = config.quantizer.gain_db, config.seed, f"{stage}/gain"

    def draws(self, positions_B: Tensor) -> dict[str, Tensor]:
        """Draw each clip's gain in dB."""
        return {"gain_db": self.gain_db * (2 * uniform(keys(self.seed, self.purpose, positions_B)) - 1)}

    def forward(self, inputs: Inputs) -> Losses:
        """Compute the quantizer's loss, averaged over each clip's z vectors."""
        assert self.quantizer is not None
        with torch.no_grad():
            z_BNZ = self.g(self.at_drawn_gain(inputs)).transpose(1, 2)
        losses_BN = self.quantizer(z_BNZ.flatten(0, 1)).unflatten(0, z_BNZ.shape[:2])
        mask_BN = mask_of_z(inputs.mask, z_BNZ).to(losses_BN.dtype)
        losses_B = (losses_BN * mask_BN).sum(1) / mask_BN.sum(1).clamp_min(1)
        return Losses({"quantization": losses_B}, torch.full_like(losses_B, 0.5))

    def at_drawn_gain(self, inputs: Inputs) -> Tensor:
        """Recompute x0 at another gain, which each sample's key draws."""
        if self.gain_db == 0 or not self.searches:
            return inputs.x0
        (autoencoder,) = self.frozen
        with torch.autocast(inputs.x0.device.type, enabled=False):
            return autoencoder.at_gain(inputs.x0, self.drawn(inputs)["gain_db"])


class CodePrior(Objective):
    """The prior's loss: bits per code of z, with a number of codebooks drawn for each sample."""

    def __init__(self, config: Config, stage: str, codec: SPresso) -> None:
        super().__init__()
        self.g, self.prior = codec.g, codec.prior
        self.quantizers = (codec.quantizer,)  # The tuple hides the quantizer, as in `LatentDenoiser`.
        self.seed, self.purpose, self.rates = config.seed, stage, config.rates

    def draws(self, positions_B: Tensor) -> dict[str, Tensor]:
        """Draw the rows of the samples at each rate."""
        return rows_at_rates(keys(self.seed, f"{self.purpose}/rate", positions_B), self.rates)

    def forward(self, inputs: Inputs) -> Losses:
        """Compute the bits per code, averaged over each clip's codes."""
        (quantizer,), prior = self.quantizers, self.prior
        assert quantizer is not None
        assert prior is not None
        with torch.no_grad():
            z_BNZ = self.g(inputs.x0).transpose(1, 2).float()
        if not self.searches:
            bits_B = prior(z_BNZ.new_zeros(*z_BNZ.shape[:2], self.rates[0], dtype=torch.int64)).mean(dim=(1, 2))
            return Losses({"bits": bits_B}, torch.full_like(bits_B, 0.5))
        mask_BN = mask_of_z(inputs.mask, z_BNZ).float()
        losses_B, draws = z_BNZ.new_zeros(len(z_BNZ)), self.drawn(inputs)
        for rate, books in enumerate(self.rates):
            # Call the prior even for an empty batch: under some strategies, ranks gather its weights together per call.
            rows = draws[f"rate_{rate}"]
            bits_BN = prior(quantizer.encode(z_BNZ[rows], books=books)).mean(dim=2) * mask_BN[rows]
            losses_B[rows] = bits_BN.sum(1) / mask_BN[rows].sum(1).clamp_min(1)
        return Losses({"bits": losses_B}, torch.full_like(losses_B, 0.5))
