"""A tiny release of Stable Audio 3 with random weights, written by diffusers' and transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableAudio3DiTModel, StableAudio3Pipeline
from diffusers.models.autoencoders.autoencoder_same import AutoencoderSAME
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
from transformers import GemmaTokenizer, T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

from tests.stable_audio import shaken

CHANNELS, TOKENS, WIDTH, MEMORY, HOP, RATE = 8, 12, 24, 3, 32, 8000


def transformer(**settings: object) -> StableAudio3DiTModel:
    """Make a DiT in which no layer outputs zeros, as in a trained DiT and unlike in a fresh one."""
    torch.manual_seed(1)
    sizes = {
        "io_channels": CHANNELS,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "cond_token_dim": WIDTH,
        "global_cond_dim": WIDTH,
        "local_add_cond_dim": CHANNELS + 1,
        "timestep_features_dim": 16,
        "ff_mult": 2.0,
        "num_memory_tokens": MEMORY,
    }
    return shaken(StableAudio3DiTModel(**sizes | settings)).eval()


def autoencoder(**settings: object) -> AutoencoderSAME:
    """Make a stereo autoencoder with a hop of 8 · 4 samples at 8 kHz, which gives latents at 250 Hz."""
    torch.manual_seed(2)
    sizes = {
        "patch_size": 8,
        "encoder_channels": 8,
        "encoder_c_mults": [2],
        "encoder_strides": [4],
        "encoder_transformer_depths": [2],
        "latent_dim": CHANNELS,
        "dim_heads": 8,
        "ff_mult": 2,
        "decoder_sinusoidal_blocks": [1],
        "sampling_rate": RATE,
    }
    model = shaken(AutoencoderSAME(**sizes | settings))
    model.bottleneck.running_std.fill_(0.3)
    return model.eval()


def duration_embedder() -> StableAudio3DurationEmbedder:
    """Make the embedding of a duration."""
    torch.manual_seed(3)
    return StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16)


def text_encoder() -> T5GemmaEncoderModel:
    """Make a T5Gemma encoder of two layers, one with full and one with sliding attention."""
    torch.manual_seed(4)
    sizes = {
        "vocab_size": 32,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
    }
    config = T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**sizes),
        decoder=T5GemmaModuleConfig(**sizes),
        vocab_size=32,
        is_encoder_decoder=False,
    )
    return T5GemmaEncoderModel(config).eval()


def tokenizer() -> GemmaTokenizer:
    """Make a tokenizer whose tokens are single letters."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"▁abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def pipeline() -> StableAudio3Pipeline:
    """Put the parts together, with the scheduler of a release that is not distilled."""
    return StableAudio3Pipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        duration_embedder=duration_embedder(),
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
    )


def write_release(folder: Path, *, shards: bool = False) -> Path:
    """Write all parts to a folder, as the pipeline's `save_pretrained` does."""
    pipeline().save_pretrained(folder, **({"max_shard_size": "8KB"} if shards else {}))
    return folder
