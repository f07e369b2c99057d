"""SAME, the autoencoder of Stable Audio 3 (arXiv 2605.18613), in diffusers' layout: 256 channels at 10.8 Hz, stereo."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from models.autoencoder import AudioAE
from models.autoencoder_sizes import SameConfig
from models.backbones.released import find_part, open_part, read_config, require, require_package
from models.documents import Natural, Size
from models.weights import Fill, filled

_CLASS = "AutoencoderSAME"


class _Settings(TypedDict):
    """The settings of the autoencoder in diffusers."""

    audio_channels: Size
    patch_size: Size
    encoder_channels: Size
    encoder_c_mults: list[Size]
    encoder_strides: list[Size]
    encoder_transformer_depths: list[Natural]
    latent_dim: Size
    use_differential_attention: bool
    dim_heads: Size
    ff_mult: Size
    sliding_window: Natural
    encoder_sinusoidal_blocks: list[Natural]
    decoder_sinusoidal_blocks: list[Natural]
    sampling_rate: Size


class SameAE(AudioAE):
    """An autoencoder of Transformer blocks with sliding windows, for 44.1 kHz audio; stereo has one latent for both.

    Each frame covers one hop. The latents are not rescaled: the model divides them by their standard deviation.
    """

    name = "same"
    surplus_frames = 0
    # An attention's mask grows with the square of a block: to 27 MB for the 12 seconds of this one in SAME-L.
    most_frames = 128

    def __init__(self, config: SameConfig):
        super().__init__(asdict(config))
        require_package("diffusers", "stable_audio", "the autoencoder of kind 'same'")
        from diffusers.models.autoencoders.autoencoder_same import AutoencoderSAME, SAMEAttention

        self.sample_rate, self.latent_channels, self.hop = config.sample_rate, config.latent_channels, config.hop
        self.channels, self.context = config.audio_channels, config.context
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*weight_norm.* is deprecated", FutureWarning)
            model = AutoencoderSAME(**_diffusers_settings(config))
        self.patches, self.bottleneck = model.patch_embed, model.bottleneck
        self.encoder, self.decoder = model.encoder, model.decoder
        for attention in self.modules():
            if isinstance(attention, SAMEAttention):
                attention.add_module("rope", _Rotary(attention.dim_heads // 2))
        self.requires_grad_(False)

    def _encode(self, audio_BAS: Tensor) -> Tensor:
        return self.bottleneck.encode(self.encoder(self.patches.encode(audio_BAS))).contiguous()

    def _decode(self, x0_BCT: Tensor) -> Tensor:
        return self.patches.decode(self.decoder(self.bottleneck.decode(x0_BCT)))


class _Rotary(nn.Module):
    """The same angles as the release's module gives, which keeps its frequencies in a buffer that no file holds."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, tokens: int, device: torch.device) -> Tensor:
        """Return the angles `(tokens, features)` by which RoPE turns the features of a head."""
        frequencies = 1.0 / (10000 ** (torch.arange(0, self.width, 2, device=device).float() / self.width))
        angles = torch.outer(torch.arange(tokens, device=device, dtype=frequencies.dtype), frequencies)
        return torch.cat((angles, angles), -1)


def load_same(folder: str | Path, fill: Fill = filled) -> SameAE:
    """Load the autoencoder from the subfolder `vae/` of a release, given by its folder or its hub name.

    Raises:
        ValueError: the autoencoder is missing or damaged, or is another model.
    """
    part, config = find_part(folder, "vae"), read_same_config(folder)
    return fill(lambda: SameAE(config), open_part(part), str(part))


def read_same_config(folder: str | Path) -> SameConfig:
    """Read the autoencoder's sizes without its weights; raises as `load_same` does."""
    part = find_part(folder, "vae")
    given = read_config(part, _CLASS, _Settings)
    levels = len(given["encoder_strides"])
    sines = {name: list(given[f"{name}_sinusoidal_blocks"]) for name in ("encoder", "decoder")}
    require(
        part / "config.json",
        {
            "audio_channels is 1 or 2": given["audio_channels"] <= 2,
            "encoder_c_mults and encoder_transformer_depths have a number for each of encoder_strides": len(
                given["encoder_c_mults"]
            )
            == len(given["encoder_transformer_depths"])
            == levels
            > 0,
            "there are sinusoidal blocks for each of encoder_strides, or one number for all": all(
                len(each) in (1, levels) for each in sines.values()
            ),
        },
    )
    return SameConfig(
        latent_channels=given["latent_dim"],
        audio_channels=given["audio_channels"],
        patch_size=given["patch_size"],
        width=given["encoder_channels"],
        multiples=list(given["encoder_c_mults"]),
        strides=list(given["encoder_strides"]),
        depths=list(given["encoder_transformer_depths"]),
        head_width=given["dim_heads"],
        hidden_factor=given["ff_mult"],
        differential=given["use_differential_attention"],
        sliding_window=given["sliding_window"],
        encoder_sines=sines["encoder"],
        decoder_sines=sines["decoder"],
        sample_rate=given["sampling_rate"],
    )


def _diffusers_settings(config: SameConfig) -> dict[str, Any]:
    return {
        "audio_channels": config.audio_channels,
        "patch_size": config.patch_size,
        "encoder_channels": config.width,
        "encoder_c_mults": config.multiples,
        "encoder_strides": config.strides,
        "encoder_transformer_depths": config.depths,
        "latent_dim": config.latent_channels,
        "use_differential_attention": config.differential,
        "dim_heads": config.head_width,
        "ff_mult": config.hidden_factor,
        "sliding_window": config.sliding_window,
        "encoder_sinusoidal_blocks": config.encoder_sines,
        "decoder_sinusoidal_blocks": config.decoder_sines,
        "sampling_rate": config.sample_rate,
    }
