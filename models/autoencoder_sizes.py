"""Sizes of the autoencoders that have weights. Importing this module needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class VocosConfig:
    """Size and shape of a `VocosAE`; the defaults are the public release's."""

    latent_channels: int = 128
    """Channels of the latents."""
    width: int = 2048
    """Features of a frame inside the encoder and the decoder."""
    hidden_width: int = 3072
    """Features of the MLPs' hidden layer."""
    encoder_depth: int = 8
    """Number of blocks in the encoder."""
    decoder_depth: int = 8
    """Number of blocks in the decoder."""
    n_fft: int = 960
    """Length of an STFT frame in samples; at least twice the hop."""
    hop: int = 480
    """Samples from the start of one frame to the start of the next."""
    sample_rate: int = 48000
    """Samples per second."""


@dataclass
class OobleckConfig:
    """Size and shape of an `OobleckAE`; the defaults are the public release's."""

    latent_channels: int = 64
    """Channels of the latents."""
    width: int = 128
    """Features of the decoder at the audio's sample rate; the encoder has 2 · latent_channels there."""
    multiples: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Factors by which the number of features grows after each strided convolution."""
    strides: list[int] = field(default_factory=lambda: [2, 4, 4, 8, 8])
    """Strides of the encoder's convolutions, all even; their product is the hop."""
    audio_channels: int = 2
    """Audio channels that the model takes and returns; 2 is stereo."""
    sample_rate: int = 44100
    """Samples per second."""

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.strides)
