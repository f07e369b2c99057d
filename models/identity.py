"""The hashes by which a codec is known: that of the model, which streams name, and those of what it leaves out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from models.later_fields import without_later
from models.lora import DISTILLED, file_tensors
from models.sizes import LatentEncoderConfig
from models.weights import hash_state

if TYPE_CHECKING:
    from models.codec import SPresso

_BESIDE = ("prior", "distilled")
"""Parts that the model's hash leaves out: codes depend on neither, and entropy-coded files name the prior's hash."""


def model_hash(codec: SPresso, config: Mapping[str, Any] | None = None) -> str:
    """Hash the model; `config` is the one of an export, which lacks the settings that were added after it."""
    config = dict(dataclasses.asdict(codec.config) if config is None else config)
    config["latent_encoder"] = without_later(config["latent_encoder"], LatentEncoderConfig)
    tensors: dict[str, Tensor] = {f"adapter.{name}": value for name, value in file_tensors(codec.dit).items()}
    for part, (module, _) in codec.parts().items():
        if part not in _BESIDE:
            tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    local = ("sampling", "autoencoder")  # decoding settings and file paths do not identify a model
    identity = {name: value for name, value in config.items() if name not in local}
    return hash_state(identity | {"base": codec.base_hash, "autoencoder": codec.autoencoder.identity()}, tensors)


def part_hashes(codec: SPresso) -> dict[str, str]:
    """Hash what the model's hash leaves out: the quantizer's settings, and the parts beside the model."""
    parts = codec.parts()
    left_out: dict[str, Mapping[str, Tensor]] = {"quantizer": {}}
    left_out |= {part: parts[part][0].state_dict() for part in _BESIDE if part in parts}
    if "distilled" in left_out:
        left_out["distilled"] = {**left_out["distilled"], **file_tensors(codec.dit, DISTILLED)}
    return {f"the {name}": hash_state(parts[name][1], state) for name, state in left_out.items() if name in parts}
