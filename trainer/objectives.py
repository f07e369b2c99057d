"""What training calls: modules from `Inputs` to `Losses`. All that is random in them is keyed by a sample's position.

To add a loss term to a stage, give it a name in the `terms` of the stage's module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.autoencoder import AudioAE
from models.codec import SPresso
from models.decoder import Decoder
from models.diffusion import Prediction, make_diffusion
from trainer.inputs import Inputs
from trainer.losses import Losses
from trainer.randomness import integers, keys, normal, uniform
from trainer.recipes.schema import Config


class Objective(nn.Module):
    """A stage's module: called with a micro batch's `Inputs`, it returns the `Losses` of each sample."""

    searches = True
    """Whether work that has no gradient and depends on values is done: the search for codes, other gains. The memory
    plan turns it off, because its tensors have shapes and no values."""

    def forward(self, inputs: Inputs) -> Losses:
        """The loss terms of each sample."""
        raise NotImplementedError


class Denoiser(Objective):
    """E‖D(x0 + noise, condition) − x0‖², in the chosen formulation (arXiv 2602.15082, step 1)."""

    def __init__(self, config: Config, stage: str, dit: Decoder) -> None:
        super().__init__()
        self.dit = dit
        self.diffusion = make_diffusion(config.diffusion.name, **config.diffusion.options)
        self.purpose, self.seed = stage, config.seed
        self.condition_dropout = config.stage(stage).condition_dropout

    def forward(self, inputs: Inputs) -> Losses:
        """Noise x0 at the level that each sample's position draws, let D predict, and compare."""
        x0_BCT = inputs.x0
        u_B = uniform(self.keys("level", inputs.positions))
        noise_BCT = normal(self.keys("noise", inputs.positions), *x0_BCT.shape[1:])
        conditions = {**self.conditions(inputs), **inputs.conditions}
        t_B = self.diffusion.noise_level(u_B)
        prediction = self.diffusion.prediction(lambda x, t: self.dit(x, t, **conditions), x0_BCT, noise_BCT, t_B)
        return Losses(self.terms(inputs, prediction), u_B)

    def conditions(self, inputs: Inputs) -> dict[str, Tensor]:
        """Conditions that the stage itself computes, by the names of D's arguments; none here."""
        return {}

    def terms(self, inputs: Inputs, prediction: Prediction) -> dict[str, Tensor]:
        """The loss terms (b,) by name. `prediction` has D's output, its target, and the estimate of x0."""
        return {"denoising": prediction.squared_error(inputs.mask)}

    def keys(self, purpose: str, positions_B: Tensor) -> Tensor:
        """Keys of one purpose, apart from the other stages' keys."""
        return keys(self.seed, f"{self.purpose}/{purpose}", positions_B)


class LatentDenoiser(Denoiser):
    """D on f(z), with z = g(x0), or z_q at a number of codebooks drawn for each sample."""

    def __init__(self, config: Config, stage: str, codec: SPresso, rates: list[int]) -> None:
        super().__init__(config, stage, codec.dit)
        self.g, self.f = codec.g, codec.f
        # in a tuple it is no part of this module: frozen, in float32 whatever the rest is computed in, on every rank
        self.quantizers = (codec.quantizer,)
        self.rates = rates

    def conditions(self, inputs: Inputs) -> dict[str, Tensor]:
        """f(z), or zeros where a sample's key drops z."""
        z_BZN = self.g(inputs.x0)
        if self.rates and self.searches:
            z_BZN = self.quantized(z_BZN, inputs.positions)
        kept_B = uniform(self.keys("drop", inputs.positions)) >= self.condition_dropout
        return {"condition": self.f(z_BZN) * kept_B[:, None, None]}

    def quantized(self, z_BZN: Tensor, positions_B: Tensor) -> Tensor:
        """z_q, each sample at the rate that its key draws."""
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


def heard(mask_BT: Tensor | None, z_BNZ: Tensor) -> Tensor:
    """Which z are of a sample, at least in part, and not of its padding: (b, N), bool."""
    if mask_BT is None:
        return torch.ones(z_BNZ.shape[:2], dtype=torch.bool, device=z_BNZ.device)
    return mask_BT.unflatten(1, (z_BNZ.shape[1], -1)).any(2)


class Quantization(Objective):
    """The quantizer's own loss on z, of clips heard at gains that their keys draw."""

    def __init__(self, config: Config, stage: str, codec: SPresso) -> None:
        super().__init__()
        self.g, self.quantizer = codec.g, codec.quantizer
        self.frozen = (codec.autoencoder,)  # in a tuple it is no part of this module
        self.gain_db, self.seed, self.purpose = config.quantizer.gain_db, config.seed, f"{stage}/gain"

    def forward(self, inputs: Inputs) -> Losses:
        """The mean over a clip's z of the quantizer's loss."""
        assert self.quantizer is not None
        with torch.no_grad():
            z_BNZ = self.g(self.regained(inputs.x0, inputs.positions)).transpose(1, 2)
        losses_BN = self.quantizer(z_BNZ.flatten(0, 1)).unflatten(0, z_BNZ.shape[:2])
        heard_BN = heard(inputs.mask, z_BNZ).to(losses_BN.dtype)
        losses_B = (losses_BN * heard_BN).sum(1) / heard_BN.sum(1).clamp_min(1)
        return Losses({"quantization": losses_B}, torch.full_like(losses_B, 0.5))

    def regained(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor:
        """x0 as it would be at another gain, the sample's own."""
        if self.gain_db == 0 or not self.searches:
            return x0_BCT
        (autoencoder,) = self.frozen
        gain_db_B = self.gain_db * (2 * uniform(keys(self.seed, self.purpose, positions_B)) - 1)
        with torch.autocast(x0_BCT.device.type, enabled=False):
            return at_gain(autoencoder, x0_BCT, gain_db_B)


def at_gain(autoencoder: AudioAE, x0_BCT: Tensor, gain_db_B: Tensor) -> Tensor:
    """x0 of the same sounds at other gains, by way of their audio."""
    held_BCT = torch.cat([x0_BCT, x0_BCT[..., -1:]], dim=-1).float()  # its last frame has a whole hop, too
    audio_B1S = autoencoder.decode(held_BCT) * 10 ** (gain_db_B.float() / 20)[:, None, None]
    return autoencoder.encode(audio_B1S)[..., : x0_BCT.shape[-1]].to(x0_BCT.dtype)


class CodePrior(Objective):
    """Bits a code, of z's codes at a number of codebooks drawn for each sample."""

    def __init__(self, config: Config, stage: str, codec: SPresso) -> None:
        super().__init__()
        self.g, self.prior = codec.g, codec.prior
        self.quantizers = (codec.quantizer,)  # in a tuple for the reasons that LatentDenoiser has
        self.seed, self.purpose, self.rates = config.seed, stage, config.rates

    def forward(self, inputs: Inputs) -> Losses:
        """The mean over a clip's codes of the bits that each takes."""
        (quantizer,), prior = self.quantizers, self.prior
        assert quantizer is not None
        assert prior is not None
        with torch.no_grad():
            z_BNZ = self.g(inputs.x0).transpose(1, 2).float()
        if not self.searches:
            bits_B = prior(z_BNZ.new_zeros(*z_BNZ.shape[:2], self.rates[0], dtype=torch.int64)).mean(dim=(1, 2))
            return Losses({"bits": bits_B}, torch.full_like(bits_B, 0.5))
        heard_BN = heard(inputs.mask, z_BNZ).float()
        drawn_B = integers(keys(self.seed, f"{self.purpose}/rate", inputs.positions), len(self.rates))
        losses_B = z_BNZ.new_zeros(len(z_BNZ))
        for rate, books in enumerate(self.rates):
            chosen_B = drawn_B == rate  # none is a batch, too: ranks gather weights together, call by call
            bits_BN = prior(quantizer.encode(z_BNZ[chosen_B], books=books)).mean(dim=2) * heard_BN[chosen_B]
            losses_B[chosen_B] = bits_BN.sum(1) / heard_BN[chosen_B].sum(1).clamp_min(1)
        return Losses({"bits": losses_B}, torch.full_like(losses_B, 0.5))
