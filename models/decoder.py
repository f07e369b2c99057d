"""The kinds of decoder D, and their construction from sizes. Add further kinds here."""

from __future__ import annotations

from models.backbones.stable_audio import StableAudioDiT
from models.backbones.woosh_flow_map import WooshFlowMap
from models.dit import DiT
from models.sizes import DecoderConfig, StableAudioConfig, WooshFlowMapConfig

Decoder = DiT | StableAudioDiT


def make_decoder(config: DecoderConfig) -> Decoder:
    """Build an untrained D of these sizes."""
    if isinstance(config, WooshFlowMapConfig):
        return WooshFlowMap(config)
    return StableAudioDiT(config) if isinstance(config, StableAudioConfig) else DiT(config)
