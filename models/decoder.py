"""The kinds of decoder D, and their construction from sizes. Add further kinds here."""

from __future__ import annotations

from models.backbones.stable_audio import StableAudioDiT
from models.backbones.stable_audio_3 import StableAudio3DiT
from models.backbones.woosh_flow_map import WooshFlowMap
from models.dit import DiT
from models.sizes import DecoderConfig, WooshFlowMapConfig
from models.stable_audio_sizes import StableAudio3Config, StableAudioConfig

Decoder = DiT | StableAudioDiT | StableAudio3DiT


def make_decoder(config: DecoderConfig) -> Decoder:
    """Build an untrained D of these sizes."""
    if isinstance(config, WooshFlowMapConfig):
        return WooshFlowMap(config)
    if isinstance(config, StableAudio3Config):
        return StableAudio3DiT(config)
    return StableAudioDiT(config) if isinstance(config, StableAudioConfig) else DiT(config)
