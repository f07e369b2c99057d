"""A stage's model without its numbers: every shape of what would be trained and of what would lie frozen beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.backbones.pretrained import outline_autoencoder, read_dit_config
from models.codec import SPresso, lora_config
from models.decoder import make_decoder
from models.export import ADAPTER
from models.latent_encoder import LatentEncoder, Upsampler
from models.prior import Prior
from models.quantizers.quantizer import make_quantizer
from models.sizes import DecoderConfig
from trainer.objectives import CodePrior, Denoiser, LatentDenoiser, Quantization
from trainer.ranks.strategy import blocks_of
from trainer.recipes.schema import Config
from trainer.run_directory import base_model

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Outline:
    """What a stage computes with."""

    dit: DecoderConfig
    trained: Shapes
    """Of each trained parameter, under its name in the stage's module."""
    frozen: Shapes
    """Of each frozen one in it."""
    blocks: list[set[str]]
    """The parameters of each Transformer block."""
    beside: int
    """Bytes of what lies on the device next to the module, in float32 on every rank: the AudioAE, and parts of the
    codec that only decode for the log."""


def outline(config: Config, stage: str) -> Outline:
    """Shapes of a stage's model.

    Raises:
        ValueError: a folder of pretrained weights is missing, damaged or of another kind.
    """
    dit = dit_config(config, stage)
    module = stage_module(config, stage, dit)
    named = dict(module.named_parameters())
    names = {id(value): name for name, value in named.items()}
    return Outline(
        dit,
        trained={name: value.shape for name, value in named.items() if value.requires_grad},
        frozen={name: value.shape for name, value in named.items() if not value.requires_grad},
        blocks=[{names[id(value)] for value in block.parameters()} for block in blocks_of(module)],
        beside=_float32_bytes(_beside(config, stage, module)),
    )


def dit_config(config: Config, stage: str) -> DecoderConfig:
    """D's sizes, from where its weights are or will be."""
    base = base_model(config)
    if stage == "pretrain" or (config.pretrained.folder is None and not base.exists()):
        return config.dit
    return read_dit_config(base)


def stage_module(config: Config, stage: str, dit: DecoderConfig) -> nn.Module:
    """What `make_task(config, stage).module` would be, on the meta device, with D of these sizes.

    At `finetune` z passes unquantized: the search for codes has no gradient, and z_q the shape of z. At `quantize` x0
    keeps its gain, for the same reason.
    """
    with torch.device("meta"):
        if stage == "pretrain":
            return Denoiser(config, stage, make_decoder(dit))
        codec = _codec(config, dit)
        if stage == "quantize":
            codec.quantizer.requires_grad_(True)
            no_gain = dataclasses.replace(config, quantizer=dataclasses.replace(config.quantizer, gain_db=0.0))
            return Quantization(no_gain, stage, cast(SPresso, codec))
        if stage == "prior":
            codec.prior = Prior(config.quantizer.books, config.quantizer.size)
            return CodePrior(config, stage, cast(SPresso, codec))
        learned = [value for name, value in codec.dit.named_parameters() if f".{ADAPTER}." in name]
        for part in (codec.g, codec.f) if stage == "autoencode" else (codec.f,):
            learned += part.parameters()
        for parameter in learned:
            parameter.requires_grad_(True)
        return LatentDenoiser(config, stage, cast(SPresso, codec), rates=[])


def _codec(config: Config, dit_config: DecoderConfig) -> Any:
    """The parts of an SPresso, all frozen; it would hash its weights, and there are none."""
    from peft import inject_adapter_in_model

    dit = make_decoder(dit_config)
    inject_adapter_in_model(lora_config(dataclasses.asdict(config.lora), dit), dit, adapter_name=ADAPTER)
    shapes = dataclasses.replace(config.latent_encoder, latent_channels=dit_config.channels)
    parts: dict[str, nn.Module] = {
        "autoencoder": outline_autoencoder(**dataclasses.asdict(config.autoencoder)),
        "dit": dit,
        "g": LatentEncoder(shapes),
        "f": Upsampler(shapes, dit_width=dit_config.width, dit_patch_size=dit_config.patch_size),
        "quantizer": make_quantizer(config.quantizer.description(shapes.z_channels)),
    }
    return SimpleNamespace(**{name: part.requires_grad_(False) for name, part in parts.items()})


def _beside(config: Config, stage: str, module: nn.Module) -> list[nn.Module]:
    autoencoder = outline_autoencoder(**dataclasses.asdict(config.autoencoder))
    if stage in ("pretrain", "autoencode"):
        return [autoencoder]
    with torch.device("meta"):
        codec = _codec(config, dit_config(config, stage))
    if stage == "finetune":
        return [autoencoder, codec.quantizer]
    return [autoencoder, codec.dit, codec.f, *([codec.quantizer] if stage == "prior" else [])]


def _float32_bytes(modules: Iterable[nn.Module]) -> int:
    values: list[Tensor] = [value for module in modules for value in (*module.parameters(), *module.buffers())]
    return sum(4 * value.numel() for value in values)
