"""The codec that step 1 starts from."""

from __future__ import annotations

import dataclasses

from models.autoencoder import AudioAE
from models.codec import SPresso
from models.decoder import Decoder
from models.lora import start_from_base
from models.sizes import CodecConfig
from trainer.recipes.schema import Config


def fresh_codec(config: Config, *, dit: Decoder, autoencoder: AudioAE) -> SPresso:
    """Create the codec that step 1 starts from: a pretrained D with a fresh LoRA, and g and f with random weights."""
    shapes = dataclasses.replace(
        config.latent_encoder,
        latent_channels=dit.config.channels,
        signed_channels=autoencoder.signed_channels if config.latent_encoder.start == "pca" else 0,
    )
    codec_config = CodecConfig(
        autoencoder=dataclasses.asdict(config.autoencoder),
        latent_encoder=shapes,
        dit=dit.config,
        diffusion=dataclasses.asdict(config.diffusion),
        lora=config.lora.description(),
        window=config.stage("autoencode").crop_frames,
        sampling=config.sampling,
    )
    codec = SPresso(codec_config, autoencoder=autoencoder, dit=dit)
    start_from_base(dit)
    return codec
