"""The autoencoder of Stable Audio Open (arXiv 2407.14358): 44.1 kHz, 64 channels at 21.5 Hz, from diffusers' layout."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from models.autoencoder import AudioAE
from models.backbones.released import find_part, open_part, read_config, require, require_package
from models.sizes import OobleckConfig
from models.weights import filled

_CLASS = "AutoencoderOobleck"
_SETTINGS = (
    *("encoder_hidden_size", "downsampling_ratios", "channel_multiples", "decoder_channels", "decoder_input_channels"),
    *("audio_channels", "sampling_rate"),
)


class OobleckAE(AudioAE):
    """Strided convolutions with Snake activations, a variational bottleneck, and the way back.

    A frame stands for the hop at its place, so n frames are n hops. The latents are the bottleneck's mean, not a draw
    from it, and as the release's D knows them: training gave them a standard deviation of about 1, and no factor is
    applied. A stereo model takes a mono channel as both of its channels, and gives their mean back.
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
            model = AutoencoderOobleck(**_settings(config))
        self.encoder, self.decoder = model.encoder, model.decoder
        self.requires_grad_(False)

    def _encode(self, audio_B1S: Tensor) -> Tensor:
        mean_BCT, _ = self.encoder(audio_B1S.expand(-1, self.audio_channels, -1)).chunk(2, dim=1)
        return mean_BCT.contiguous()

    def _decode(self, x0_BCT: Tensor) -> Tensor:
        return self.decoder(x0_BCT).mean(1, keepdim=True)


def load_oobleck(folder: str | Path) -> OobleckAE:
    """The autoencoder in the `vae/` of a release, by its folder or its name on the hub.

    Raises:
        ValueError: it is not there, is damaged, or is another model.
    """
    part, config = find_part(folder, "vae"), read_oobleck_config(folder)
    return filled(lambda: OobleckAE(config), open_part(part), str(part))


def read_oobleck_config(folder: str | Path) -> OobleckConfig:
    """Its sizes alone; raises as `load_oobleck` does."""
    part = find_part(folder, "vae")
    given = read_config(part, _CLASS, _SETTINGS)
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
            "all downsampling_ratios are even, as others lose samples": all(ratio % 2 == 0 for ratio in config.strides),
            "there are as many channel_multiples as downsampling_ratios": len(config.multiples) == len(config.strides),
        },
    )
    return config


def _settings(config: OobleckConfig) -> dict[str, Any]:
    return {
        "encoder_hidden_size": 2 * config.latent_channels,
        "downsampling_ratios": config.strides,
        "channel_multiples": config.multiples,
        "decoder_channels": config.width,
        "decoder_input_channels": config.latent_channels,
        "audio_channels": config.audio_channels,
        "sampling_rate": config.sample_rate,
    }
