"""A release of Stable Audio Open, tiny and random: diffusers' and transformers' own classes in their own layout."""

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
"""What matters of the public release's."""


def transformer() -> StableAudioDiTModel:
    """With what a trained one has that a fresh one may lack: no layer that gives zeros."""
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
    """Two strides of 8 and 4 at 8 kHz: 250 Hz."""
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
    """Of text of another width."""
    torch.manual_seed(3)
    return StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=WIDTH, min_value=0, max_value=512)


def text_encoder() -> T5EncoderModel:
    """T5's, of one layer."""
    torch.manual_seed(4)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    return T5EncoderModel(T5Config(**sizes)).eval()


def tokenizer() -> T5Tokenizer:
    """Letters."""
    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=TOKENS)


def write_release(folder: Path, *, shards: bool = False) -> Path:
    """All parts, as `StableAudioPipeline.save_pretrained` lays them out."""
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
    """Each weight moved a little."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
