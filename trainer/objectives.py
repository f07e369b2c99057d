"""What training calls: modules from x0 to a loss for each sample. All that is random in them is a sample's own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.autoencoder import AudioAE
from models.codec import SPresso
from models.decoder import Decoder
from models.diffusion import make_diffusion
from trainer.data.text_embeddings import Text
from trainer.randomness import integers, keys, normal, uniform
from trainer.recipes.schema import Config


class Losses(NamedTuple):
    """Per-sample losses (b,) and where in the noise levels' distribution each sample lay, in (0, 1), (b,)."""

    losses: Tensor
    quantiles: Tensor


class Denoiser(nn.Module):
    """E‖D(x0 + noise, condition) − x0‖², in the chosen formulation; what is random comes from a sample's position."""

    def __init__(self, config: Config, stage: str, dit: Decoder) -> None:
        super().__init__()
        self.dit = dit
        self.diffusion = make_diffusion(config.diffusion.name, **config.diffusion.options)
        self.purpose, self.seed = stage, config.seed
        self.condition_dropout = config.stage(stage).condition_dropout

    def forward(
        self, x0_BCT: Tensor, positions_B: Tensor, mask_BT: Tensor | None = None, text: Text | None = None
    ) -> Losses:
        """The denoising error of x0 (b, C, T) at the noise level that each sample's position draws."""
        u_B = uniform(self.keys("level", positions_B))
        noise_BCT = normal(self.keys("noise", positions_B), *x0_BCT.shape[1:])
        condition = self.condition(x0_BCT, positions_B)
        t_B = self.diffusion.noise_level(u_B)
        conditions = {"condition": condition}
        if text is not None:
            conditions |= {"text": text.tokens, "text_mask": text.mask}
        losses_B = self.diffusion.loss(lambda x, t: self.dit(x, t, **conditions), x0_BCT, noise_BCT, t_B, mask_BT)
        return Losses(losses_B, u_B)

    def condition(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor | None:
        """Nothing, unless a stage says otherwise."""
        return None

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

    def condition(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor:
        """f(z), or zeros where a sample's key drops it."""
        z_BZN = self.g(x0_BCT)
        if self.rates:
            z_BZN = self.quantized(z_BZN, positions_B)
        kept_B = uniform(self.keys("drop", positions_B)) >= self.condition_dropout
        return self.f(z_BZN) * kept_B[:, None, None]

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


class Quantization(nn.Module):
    """The quantizer's own loss on z, of clips heard at gains that their keys draw."""

    def __init__(self, config: Config, stage: str, codec: SPresso) -> None:
        super().__init__()
        self.g, self.quantizer = codec.g, codec.quantizer
        self.frozen = (codec.autoencoder,)  # in a tuple it is no part of this module
        self.gain_db, self.seed, self.purpose = config.quantizer.gain_db, config.seed, f"{stage}/gain"

    def forward(
        self, x0_BCT: Tensor, positions_B: Tensor, mask_BT: Tensor | None = None, text: Text | None = None
    ) -> Losses:
        """The mean over a clip's z of the quantizer's loss."""
        assert self.quantizer is not None
        with torch.no_grad():
            z_BNZ = self.g(self.regained(x0_BCT, positions_B)).transpose(1, 2)
        losses_BN = self.quantizer(z_BNZ.flatten(0, 1)).unflatten(0, z_BNZ.shape[:2])
        heard_BN = heard(mask_BT, z_BNZ).to(losses_BN.dtype)
        losses_B = (losses_BN * heard_BN).sum(1) / heard_BN.sum(1).clamp_min(1)
        return Losses(losses_B, torch.full_like(losses_B, 0.5))

    def regained(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor:
        """x0 as it would be at another gain, the sample's own."""
        if self.gain_db == 0:
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


class CodePrior(nn.Module):
    """Bits a code, of z's codes at a number of codebooks drawn for each sample."""

    def __init__(self, config: Config, stage: str, codec: SPresso) -> None:
        super().__init__()
        self.g, self.prior = codec.g, codec.prior
        self.quantizers = (codec.quantizer,)  # in a tuple for the reasons that LatentDenoiser has
        self.seed, self.purpose, self.rates = config.seed, stage, config.rates

    def forward(
        self, x0_BCT: Tensor, positions_B: Tensor, mask_BT: Tensor | None = None, text: Text | None = None
    ) -> Losses:
        """The mean over a clip's codes of the bits that each takes."""
        (quantizer,), prior = self.quantizers, self.prior
        assert quantizer is not None
        assert prior is not None
        with torch.no_grad():
            z_BNZ = self.g(x0_BCT).transpose(1, 2).float()
        heard_BN = heard(mask_BT, z_BNZ).float()
        drawn_B = integers(keys(self.seed, f"{self.purpose}/rate", positions_B), len(self.rates))
        losses_B = z_BNZ.new_zeros(len(z_BNZ))
        for rate, books in enumerate(self.rates):
            chosen_B = drawn_B == rate  # none is a batch, too: ranks gather weights together, call by call
            bits_BN = prior(quantizer.encode(z_BNZ[chosen_B], books=books)).mean(dim=2) * heard_BN[chosen_B]
            losses_B[chosen_B] = bits_BN.sum(1) / heard_BN[chosen_B].sum(1).clamp_min(1)
        return Losses(losses_B, torch.full_like(losses_B, 0.5))
