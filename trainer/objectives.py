"""The modules that training calls: each maps `Inputs` to `Losses`. Their random numbers are keyed by sample position.

To add a loss term to a stage, give it a name in the `terms` of the stage's module.
"""

from __future__ import annotations

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

    def forward(self, inputs: Inputs) -> Losses:
        """Compute the loss terms of each sample."""
        raise NotImplementedError


class Denoiser(Objective):
    """Trains D to minimise E‖D(x0 + noise, condition) − x0‖² in the recipe's formulation (arXiv 2602.15082, step 1)."""

    def __init__(self, config: Config, stage: str, dit: Decoder) -> None:
        super().__init__()
        self.dit = dit
        self.diffusion = make_diffusion(config.diffusion.name, **config.diffusion.options)
        self.purpose, self.seed = stage, config.seed
        self.condition_dropout = config.stage(stage).condition_dropout

    def forward(self, inputs: Inputs) -> Losses:
        """Add noise at a level drawn by each sample's key, let D predict, and compute the loss."""
        x0_BCT = inputs.x0
        u_B = uniform(self.keys("level", inputs.positions))
        noise_BCT = normal(self.keys("noise", inputs.positions), *x0_BCT.shape[1:])
        conditions = {**self.conditions(inputs), **inputs.conditions}
        t_B = self.diffusion.noise_level(u_B)
        prediction = self.diffusion.prediction(lambda x, t: self.dit(x, t, **conditions), x0_BCT, noise_BCT, t_B)
        return Losses(self.terms(inputs, prediction), u_B)

    def conditions(self, inputs: Inputs) -> dict[str, Tensor]:
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

    def conditions(self, inputs: Inputs) -> dict[str, Tensor]:
        """Compute f(z), or zeros for samples whose key drops z."""
        z_BZN = self.g(inputs.x0)
        if self.rates and self.searches:
            z_BZN = self.quantized(z_BZN, inputs.positions)
        kept_B = uniform(self.keys("drop", inputs.positions)) >= self.condition_dropout
        return {"condition": self.f(z_BZN) * kept_B[:, None, None]}

    def quantized(self, z_BZN: Tensor, positions_B: Tensor) -> Tensor:
        """Quantize z, each sample at the rate that its key draws."""
        (quantizer,) = self.quantizers
        assert quantizer is not None
        with torch.no_grad(), torch.autocast(z_BZN.device.type, enabled=False):
            drawn_B = integers(self.keys("rate", positions_B), len(self.rates))
            z_q = torch.empty_like(z_BZN)
            for rate, books in enumerate(self.rates):
                chosen = drawn_B == rate
                codes_BNM = quantizer.encode(z_BZN[chosen].transpose(1, 2).float(), books=books)
                z_q[chosen] = quantizer.decode(codes_BNM).transpose(1, 2).to(z_q.dtype)
        return z_q


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

    def forward(self, inputs: Inputs) -> Losses:
        """Compute the quantizer's loss, averaged over each clip's z vectors."""
        assert self.quantizer is not None
        with torch.no_grad():
            z_BNZ = self.g(self.at_drawn_gain(inputs.x0, inputs.positions)).transpose(1, 2)
        losses_BN = self.quantizer(z_BNZ.flatten(0, 1)).unflatten(0, z_BNZ.shape[:2])
        mask_BN = mask_of_z(inputs.mask, z_BNZ).to(losses_BN.dtype)
        losses_B = (losses_BN * mask_BN).sum(1) / mask_BN.sum(1).clamp_min(1)
        return Losses({"quantization": losses_B}, torch.full_like(losses_B, 0.5))

    def at_drawn_gain(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor:
        """Recompute x0 at another gain, which each sample's key draws."""
        if self.gain_db == 0 or not self.searches:
            return x0_BCT
        (autoencoder,) = self.frozen
        gain_db_B = self.gain_db * (2 * uniform(keys(self.seed, self.purpose, positions_B)) - 1)
        with torch.autocast(x0_BCT.device.type, enabled=False):
            return autoencoder.at_gain(x0_BCT, gain_db_B)


class CodePrior(Objective):
    """The prior's loss: bits per code of z, with a number of codebooks drawn for each sample."""

    def __init__(self, config: Config, stage: str, codec: SPresso) -> None:
        super().__init__()
        self.g, self.prior = codec.g, codec.prior
        self.quantizers = (codec.quantizer,)  # The tuple hides the quantizer, as in `LatentDenoiser`.
        self.seed, self.purpose, self.rates = config.seed, stage, config.rates

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
        drawn_B = integers(keys(self.seed, f"{self.purpose}/rate", inputs.positions), len(self.rates))
        losses_B = z_BNZ.new_zeros(len(z_BNZ))
        for rate, books in enumerate(self.rates):
            # Call the prior even for an empty batch: under some strategies, ranks gather its weights together per call.
            chosen_B = drawn_B == rate
            bits_BN = prior(quantizer.encode(z_BNZ[chosen_B], books=books)).mean(dim=2) * mask_BN[chosen_B]
            losses_B[chosen_B] = bits_BN.sum(1) / mask_BN[chosen_B].sum(1).clamp_min(1)
        return Losses({"bits": losses_B}, torch.full_like(losses_B, 0.5))
