"""What D can be, and how its sizes are told apart in files. A D of one's own is entered here."""

from __future__ import annotations

from models.backbones.stable_audio import StableAudioDiT
from models.dit import DiT
from models.sizes import DecoderConfig, StableAudioConfig

Decoder = DiT | StableAudioDiT


def make_decoder(config: DecoderConfig) -> Decoder:
    """A D of these sizes, without weights that mean anything."""
    return StableAudioDiT(config) if isinstance(config, StableAudioConfig) else DiT(config)
