"""The autoencoder of Stable Audio Open (arXiv 2407.14358), loaded from diffusers' layout: 64 channels at 21.5 Hz."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from models.autoencoder import AudioAE
from models.autoencoder_sizes import OobleckConfig
from models.backbones.released import find_part, open_part, read_config, require, require_package
from models.documents import Size
from models.weights import Fill, filled

_CLASS = "AutoencoderOobleck"


class _Settings(TypedDict):
    """The settings of the autoencoder in diffusers."""

    encoder_hidden_size: Size
    downsampling_ratios: list[Size]
    channel_multiples: list[Size]
    decoder_channels: Size
    decoder_input_channels: Size
    audio_channels: Size
    sampling_rate: Size


class OobleckAE(AudioAE):
    """A variational autoencoder of strided convolutions with Snake activations, for 44.1 kHz audio.

    Each frame covers one hop. The latents are the bottleneck's mean instead of a sample from it. They are not rescaled:
    their standard deviation is about 1 already, and the release's D was trained on them. A stereo model gets the mono
    channel as left and right, and its two output channels are averaged.
    """

    name = "oobleck"
    channels = 1
    surplus_frames = 0

    def __init__(self, config: OobleckConfig):
        super().__init__(asdict(config))
        require_package("diffusers", "stable_audio", "the autoencoder of kind 'oobleck'")
        from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck

        self.sample_rate, self.latent_channels, self.hop = config.sample_rate, config.latent_channels, config.hop
        self.audio_channels = config.audio_channels
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*weight_norm.* is deprecated", FutureWarning)
            model = AutoencoderOobleck(**_diffusers_settings(config))
        self.encoder, self.decoder = model.encoder, model.decoder
        self.requires_grad_(False)

    def _encode(self, audio_B1S: Tensor) -> Tensor:
        mean_BCT, _ = self.encoder(audio_B1S.expand(-1, self.audio_channels, -1)).chunk(2, dim=1)
        return mean_BCT.contiguous()

    def _decode(self, x0_BCT: Tensor) -> Tensor:
        return self.decoder(x0_BCT).mean(1, keepdim=True)


def load_oobleck(folder: str | Path, fill: Fill = filled) -> OobleckAE:
    """Load the autoencoder from the subfolder `vae/` of a release, given by its folder or its hub name.

    Raises:
        ValueError: the autoencoder is missing or damaged, or is another model.
    """
    part, config = find_part(folder, "vae"), read_oobleck_config(folder)
    return fill(lambda: OobleckAE(config), open_part(part), str(part))


def read_oobleck_config(folder: str | Path) -> OobleckConfig:
    """Read the autoencoder's sizes without its weights; raises as `load_oobleck` does."""
    part = find_part(folder, "vae")
    given = read_config(part, _CLASS, _Settings)
    config = OobleckConfig(
        latent_channels=given["decoder_input_channels"],
        width=given["decoder_channels"],
        multiples=list(given["channel_multiples"]),
        strides=list(given["downsampling_ratios"]),
        audio_channels=given["audio_channels"],
        sample_rate=given["sampling_rate"],
    )
    require(
        part / "config.json",
        {
            "encoder_hidden_size is twice decoder_input_channels": given["encoder_hidden_size"]
            == 2 * config.latent_channels,
            "all downsampling_ratios are even (odd ones lose samples)": all(ratio % 2 == 0 for ratio in config.strides),
            "there are as many channel_multiples as downsampling_ratios": len(config.multiples) == len(config.strides),
        },
    )
    return config


def _diffusers_settings(config: OobleckConfig) -> dict[str, Any]:
    return {
        "encoder_hidden_size": 2 * config.latent_channels,
        "downsampling_ratios": config.strides,
        "channel_multiples": config.multiples,
        "decoder_channels": config.width,
        "decoder_input_channels": config.latent_channels,
        "audio_channels": config.audio_channels,
        "sampling_rate": config.sample_rate,
    }
