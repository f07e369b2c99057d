"""What a codec is made of, as its export says it in `codec.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.decoder import DecoderConfig, decoder_config
from models.latent_encoder import LatentEncoderConfig

EXPORT_FORMAT = 1


@dataclass
class Sampling:
    """How D decodes."""

    sampler: str = "dpmpp"
    """`euler`, `heun` or `dpmpp` (DPM-Solver++ 2M)."""
    steps: int = 16
    """Steps of the sampler; `heun` calls D twice a step."""
    guidance: float = 1.0
    """Classifier-free guidance of z; 1: none."""
    temperature: float = 1.0
    """By how much the noise is scaled that sampling starts from: below 1, decodes of the same codes differ less and
    keep to the likely."""


@dataclass
class CodecConfig:
    """What an SPresso is made of, next to the weights."""

    autoencoder: dict[str, Any]
    """Of the AudioAE: `kind`, `folder` (or None)."""
    latent_encoder: LatentEncoderConfig
    dit: DecoderConfig
    diffusion: dict[str, Any]
    """`name` and `options` of the formulation."""
    lora: dict[str, Any]
    """`rank` and `alpha`."""
    window: int
    """x0 frames that g and D see at a time, a multiple of the pooling: the crop of training."""
    rates: list[int] = field(default_factory=list)
    """Numbers of codebooks that D was finetuned for, the most first."""
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CodecConfig:
        """From what `dataclasses.asdict` gave."""
        parts = {"latent_encoder": LatentEncoderConfig, "sampling": Sampling}
        read = {name: part(**values[name]) for name, part in parts.items()}
        return cls(**values | read | {"dit": decoder_config(values["dit"])})


def read_description(folder: Path) -> dict[str, Any]:
    """What an export tells of itself; ValueError where there is none, or a damaged one."""
    try:
        description = json.loads((folder / "codec.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no codec: give an export folder, such as runs/demo/finetune/export") from None
    except json.JSONDecodeError:
        raise ValueError(f"{folder / 'codec.json'} is damaged: export it again") from None
    if description.get("format") != EXPORT_FORMAT:
        raise ValueError(f"{folder} was written in format {description.get('format')}, this code reads {EXPORT_FORMAT}")
    return description
