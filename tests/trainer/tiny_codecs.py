"""Codecs by others, tiny and random, saved as the real ones are."""

from __future__ import annotations

from pathlib import Path

import torch


def save_tiny_codecs(folder: Path) -> dict[str, str]:
    """DAC, EnCodec and the Stable Audio VAE; returns their folders by name, as `evaluate.weights` wants them."""
    from diffusers import AutoencoderOobleck
    from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel

    torch.manual_seed(0)
    dac = DacConfig(encoder_hidden_size=4, decoder_hidden_size=64, n_codebooks=3, sampling_rate=44_100)
    DacModel(dac).save_pretrained(folder / "dac")
    encodec = EncodecConfig(num_filters=4, hidden_size=16, num_lstm_layers=1, codebook_dim=16)
    EncodecModel(encodec).save_pretrained(folder / "encodec")
    narrow = {"channel_multiples": [1] * 5, "decoder_channels": 8, "decoder_input_channels": 4}
    AutoencoderOobleck(encoder_hidden_size=8, **narrow).save_pretrained(folder / "stable_audio")
    return {name: str(folder / name) for name in ("dac", "encodec", "stable_audio")}
