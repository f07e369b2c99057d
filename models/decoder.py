"""What D can be, and how its sizes are told apart in files. A D of one's own is entered here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.backbones.stable_audio import StableAudioConfig, StableAudioDiT
from models.dit import DiT, DiTConfig

Decoder = DiT | StableAudioDiT
DecoderConfig = DiTConfig | StableAudioConfig


def make_decoder(config: DecoderConfig) -> Decoder:
    """A D of these sizes, without weights that mean anything."""
    return StableAudioDiT(config) if isinstance(config, StableAudioConfig) else DiT(config)


def decoder_config(values: Mapping[str, Any]) -> DecoderConfig:
    """Sizes as `dataclasses.asdict` gave them; raises TypeError where a name is unknown."""
    kind = StableAudioConfig if values.get("kind") == "stable_audio" else DiTConfig
    return kind(**values)


def block_counts(config: DecoderConfig) -> tuple[int, int]:
    """How many Transformer blocks there are of each kind: multi-stream ones, then the others."""
    if isinstance(config, StableAudioConfig):
        return 0, config.depth
    return config.multistream_blocks, config.depth - config.multistream_blocks


def with_blocks(config: DecoderConfig, counts: tuple[int, int]) -> DecoderConfig:
    """The same sizes with so many blocks of each kind, at least one in all."""
    depth = max(1, sum(counts))
    if isinstance(config, StableAudioConfig):
        return dataclasses.replace(config, depth=depth)
    return dataclasses.replace(config, depth=depth, multistream_depth=counts[0])
