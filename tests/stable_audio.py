"""A tiny release of Stable Audio Open with random weights, written by diffusers' and transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from diffusers.models.transformers.stable_audio_transformer import StableAudioDiTModel
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

CHANNELS, TOKENS, WIDTH = 8, 12, 24
SCHEDULER = {
    "_class_name": "CosineDPMSolverMultistepScheduler",
    "prediction_type": "v_prediction",
    "sigma_data": 1.0,
    "sigma_max": 500,
    "sigma_min": 0.3,
    "sigma_schedule": "exponential",
}
"""The scheduler settings of the public release that the import reads."""


def transformer() -> StableAudioDiTModel:
    """Make a DiT in which no layer outputs zeros, as in a trained DiT and unlike in a fresh one."""
    torch.manual_seed(1)
    model = StableAudioDiTModel(
        sample_size=64,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=32,
        time_proj_dim=16,
        global_states_input_dim=2 * WIDTH,
        cross_attention_input_dim=WIDTH,
    )
    return shaken(model)


def autoencoder(**settings: object) -> AutoencoderOobleck:
    """Make an autoencoder with strides of 4 and 8 at 8 kHz, which gives latents at 250 Hz."""
    torch.manual_seed(2)
    sizes = {
        "encoder_hidden_size": 2 * CHANNELS,
        "downsampling_ratios": [4, 8],
        "channel_multiples": [1, 2],
        "decoder_channels": 8,
        "decoder_input_channels": CHANNELS,
        "audio_channels": 2,
        "sampling_rate": 8000,
    }
    return AutoencoderOobleck(**sizes | settings)


def projection() -> StableAudioProjectionModel:
    """Make a projection from a text encoder whose width differs from the conditioning's."""
    torch.manual_seed(3)
    return StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=WIDTH, min_value=0, max_value=512)


def text_encoder() -> T5EncoderModel:
    """Make a T5 encoder of one layer."""
    torch.manual_seed(4)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    return T5EncoderModel(T5Config(**sizes)).eval()


def tokenizer() -> T5Tokenizer:
    """Make a tokenizer whose tokens are single letters."""
    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=TOKENS)


def write_release(folder: Path, *, shards: bool = False) -> Path:
    """Write all parts to a folder in the layout of `StableAudioPipeline.save_pretrained`."""
    sharded = {"max_shard_size": "8KB"} if shards else {}
    transformer().save_pretrained(folder / "transformer", **sharded)
    autoencoder().save_pretrained(folder / "vae", **sharded)
    projection().save_pretrained(folder / "projection_model")
    text_encoder().save_pretrained(folder / "text_encoder")
    tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder


def shaken(model: nn.Module) -> nn.Module:
    """Add a little noise to each weight."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
