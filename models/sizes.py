"""Every shape's dataclass: what the models are built from. Importing this module needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class DiTConfig:
    """Size and shape of a `DiT`."""

    channels: int = 128
    """Latent channels, in and out."""
    width: int = 384
    """Features of a token."""
    depth: int = 8
    """Blocks in all, multi-stream and single-stream."""
    multistream_depth: int = 4
    """How many of them, the first ones, are multi-stream; without text there are none."""
    heads: int = 6
    """Attention heads; each has width / heads features."""
    hidden_width: int = 1536
    """Features inside the MLPs; 4 × width by custom."""
    text_width: int | None = None
    """Features of a text token as the text encoder gives them; None builds no text stream."""
    text_tokens: int = 77
    """Text tokens a caption always has: shorter ones are masked, and learned pad tokens stand in."""
    patch_size: int = 1
    """Latent frames that make up one token."""
    memory_tokens: int = 1
    """Extra tokens in the latent stream, for what belongs to no frame; they share one learned vector."""
    rotary_width: int | None = None
    """Features of a head that RoPE turns; the others don't know of positions. None turns all."""
    rotary_base: float = 10000.0
    """RoPE's base: the slowest feature turns once in about 2π · base tokens."""
    rotary_span: int = 501
    """Tokens over which the memory tokens are spread; longer inputs work."""
    yarn_trained_tokens: int | None = None
    """Tokens that RoPE spanned before YaRN stretched it to `rotary_span` (arXiv 2309.00071); None: not stretched."""
    yarn_factor: float = 40.0
    """By how much YaRN slows down RoPE's slowest frequencies."""
    time_features: int = 256
    """Fourier features of the noise level."""
    gated_skip: bool = False
    """Whether the prediction is `output(h) + skip(h) · x`: what tokens are too narrow to carry passes around them, each
    number weighed by what the tokens know. For small models with patches wider than `width`."""
    predicts_logvar: bool = False
    """Whether there is `DiT.logvar`: a learned log-variance of the loss at a noise level (arXiv 2312.02696, eq. 14)."""

    @property
    def head_width(self) -> int:
        """Features of one attention head."""
        return self.width // self.heads

    @property
    def multistream_blocks(self) -> int:
        """Multi-stream blocks that are built: none without text."""
        return 0 if self.text_width is None else self.multistream_depth

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ValueError("; ".join(problems))

    def _problems(self) -> Iterator[str]:
        sizes = ("channels", "width", "depth", "heads", "hidden_width", "text_tokens", "patch_size", "rotary_span")
        too_small = [f"{name} is {getattr(self, name)}: give at least 1" for name in sizes if getattr(self, name) < 1]
        if too_small:
            yield from too_small
            return
        if self.width % (2 * self.heads):
            yield f"width {self.width} does not split into {self.heads} heads: take a multiple of {2 * self.heads}"
        elif self.rotary_width not in (None, *range(0, self.head_width + 1, 2)):
            yield f"rotary_width is {self.rotary_width}: take an even number up to {self.head_width}, the head width"
        if self.text_width is not None and not 0 <= self.multistream_depth <= self.depth:
            yield f"multistream_depth is {self.multistream_depth}: give 0 to {self.depth}, the depth"
        if self.time_features < 2 or self.time_features % 2:
            yield f"time_features is {self.time_features}: give an even number, as they are cosines and sines"
        if not 0 <= self.memory_tokens <= self.rotary_span:
            yield f"memory_tokens is {self.memory_tokens}: give 0 to {self.rotary_span}, the rotary_span"


STABLE_AUDIO_TEXT_TOKENS = 128


@dataclass
class StableAudioConfig:
    """Size and shape of a `StableAudioDiT`; the defaults are the public release's."""

    kind: str = "stable_audio"
    """Tells these settings from another D's."""
    channels: int = 64
    """Latent channels, in and out."""
    depth: int = 24
    """Blocks."""
    heads: int = 24
    """Attention heads."""
    head_width: int = 64
    """Features of one."""
    text_heads: int = 12
    """Heads of keys and values in cross-attention, shared among the heads of queries."""
    cross_width: int = 768
    """Features of what is cross-attended to."""
    time_features: int = 256
    """Fourier features of the noise level."""
    text_width: int = 768
    """Features of a text token, as the text encoder and its projection give them."""
    text_tokens: int = STABLE_AUDIO_TEXT_TOKENS
    """Text tokens a caption always has: those that shorter ones lack are zeros."""
    seconds_features: int = 256
    """Fourier features of the seconds that a sound begins at and lasts."""
    shortest_seconds: float = 0.0
    """Fewer are told as this."""
    longest_seconds: float = 512.0
    """More are told as this."""
    frame_seconds: float = 2048 / 44100
    """Seconds of a latent frame."""

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.heads * self.head_width

    @property
    def patch_size(self) -> int:
        """Latent frames to a token."""
        return 1


DecoderConfig = DiTConfig | StableAudioConfig


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


@dataclass
class LatentEncoderConfig:
    """Shapes of g and f."""

    latent_channels: int = 128
    """Channels of x0; those of the AudioAE."""
    z_channels: int = 64
    """Channels of z: 64 at every rate in the paper."""
    pooling: int = 9
    """x0 frames to one z: at 100 Hz, 4 → 25 Hz (30×), 9 → 11.1 Hz (68×), 100 → 1 Hz (750×)."""
    patch_size: int = 1
    """x0 frames to one token of g and f; 1 as in the paper, more is cheaper. Divides `pooling`."""
    width: int = 512
    """Width of the Transformer blocks."""
    encoder_depth: int = 4
    """Transformer blocks of g."""
    upsampler_depth: int = 2
    """Transformer blocks of f."""
    heads: int = 8
    """Attention heads; `width / heads` is even."""
    magnitudes: bool = False
    """Whether g sees |x0| beside x0. In latents that are signed spectra, as `spectral`'s, the magnitudes tell the sound
    and the signs are noise; g would spend most of a short training on finding that out."""

    def problems(self) -> list[str]:
        """What is wrong with these shapes, a line each, with the mend."""
        found = []
        if self.pooling % self.patch_size:
            divisors = [n for n in range(1, self.pooling + 1) if self.pooling % n == 0]
            found.append(
                f"latent_encoder.patch_size={self.patch_size} does not divide latent_encoder.pooling={self.pooling}: "
                f"take one of {divisors}"
            )
        if self.width % (2 * self.heads):
            found.append(
                f"latent_encoder.width={self.width} is not a multiple of 2·heads: take {2 * self.heads} times a number"
            )
        return found


@dataclass
class VocosConfig:
    """Size and shape of a `VocosAE`; the defaults are the public release's."""

    latent_channels: int = 128
    """Channels of the latents."""
    width: int = 2048
    """Features of a frame inside."""
    hidden_width: int = 3072
    """Features inside the blocks' MLPs."""
    encoder_depth: int = 8
    """Blocks of the encoder."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    n_fft: int = 960
    """Samples of a spectral frame; at least twice the hop."""
    hop: int = 480
    """Samples between two frames."""
    sample_rate: int = 48000
    """Samples a second."""


@dataclass
class OobleckConfig:
    """Size and shape of an `OobleckAE`; the defaults are the public release's."""

    latent_channels: int = 64
    """Channels of the latents."""
    width: int = 128
    """Features at the audio's own rate, in the decoder; the encoder has 2 · latent_channels."""
    multiples: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """By how much more they are after each stride."""
    strides: list[int] = field(default_factory=lambda: [2, 4, 4, 8, 8])
    """Of the encoder's convolutions, each even; their product is the hop."""
    audio_channels: int = 2
    """Of the model: 2 is stereo."""
    sample_rate: int = 44100
    """Samples a second."""

    @property
    def hop(self) -> int:
        """Samples a latent frame stands for."""
        return math.prod(self.strides)


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
