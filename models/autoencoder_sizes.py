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


@dataclass
class SameConfig:
    """Size and shape of a `SameAE`; the defaults are those of diffusers' class, which SAME-S has."""

    latent_channels: int = 256
    """Channels of the latents."""
    audio_channels: int = 2
    """Audio channels that the model takes and returns together; 2 is stereo."""
    patch_size: int = 256
    """Samples of each audio channel per frame of the first level."""
    width: int = 128
    """Features of a token on each level, before they are multiplied by `multiples`."""
    multiples: list[int] = field(default_factory=lambda: [6])
    """Factor of `width` on each level."""
    strides: list[int] = field(default_factory=lambda: [16])
    """Frames of a level per frame of the next; their product times `patch_size` is the hop."""
    depths: list[int] = field(default_factory=lambda: [6])
    """Number of Transformer blocks on each level, in the encoder and in the decoder."""
    head_width: int = 64
    """Features of an attention head."""
    hidden_factor: int = 3
    """Features of the MLPs' hidden layer per feature of a token."""
    differential: bool = True
    """Whether an attention is the difference of two, which share their values (arXiv 2410.05258)."""
    sliding_window: int = 1
    """Frames of the next level on either side that a token attends to."""
    encoder_sines: list[int] = field(default_factory=lambda: [0])
    """Number on each level of the encoder's last blocks whose MLPs are gated by sines."""
    decoder_sines: list[int] = field(default_factory=lambda: [0])
    """The same for the decoder."""
    sample_rate: int = 44100
    """Samples per second."""

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return self.patch_size * math.prod(self.strides)

    @property
    def context(self) -> int:
        """Latent frames on either side that a frame, or the decoded samples of one, depend on."""
        coarser = [math.prod(self.strides[level + 1 :]) for level in range(len(self.strides))]
        reaches = [depth * self.sliding_window for depth in self.depths]
        return sum(-(-reach // frames) for reach, frames in zip(reaches, coarser, strict=True))
