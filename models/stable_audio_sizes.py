"""The sizes of the diffusion Transformers of Stable Audio. Importing this module needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from models.ranges import sizes_out_of_range

STABLE_AUDIO_TEXT_TOKENS = 128
STABLE_AUDIO_3_TEXT_TOKENS = 256


@dataclass
class StableAudioConfig:
    """Size and shape of a `StableAudioDiT`; the defaults are the public release's."""

    kind: str = "stable_audio"
    """Marks these sizes as those of a `StableAudioDiT` in files; it is always `stable_audio`."""
    channels: int = 64
    """Channels of the latents that the DiT takes and returns."""
    depth: int = 24
    """Number of Transformer blocks."""
    heads: int = 24
    """Attention heads."""
    head_width: int = 64
    """Features of an attention head."""
    text_heads: int = 12
    """Key and value heads in cross-attention; the query heads share them in groups."""
    cross_width: int = 768
    """Features of the keys' and values' input in cross-attention."""
    time_features: int = 256
    """Fourier features of the noise level."""
    text_width: int = 768
    """Features of a text token from the text encoder and its projection."""
    text_tokens: int = STABLE_AUDIO_TEXT_TOKENS
    """Text tokens per caption; zeros fill up shorter captions."""
    seconds_features: int = 256
    """Fourier features of the start and the end of a sound in seconds."""
    shortest_seconds: float = 0.0
    """Lower bound that start and end are clamped to, in seconds."""
    longest_seconds: float = 512.0
    """Upper bound that start and end are clamped to, in seconds."""
    frame_seconds: float = 2048 / 44100
    """Duration of a latent frame in seconds."""

    def __post_init__(self) -> None:
        sizes = ("channels", "depth", "heads", "head_width", "text_heads", "cross_width", "time_features", "text_width")
        if problems := list(sizes_out_of_range(self, (*sizes, "text_tokens", "seconds_features"))):
            raise ValueError("; ".join(problems))

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.heads * self.head_width

    @property
    def patch_size(self) -> int:
        """Latent frames per token."""
        return 1


@dataclass
class StableAudio3Config:
    """Size and shape of a `StableAudio3DiT`; the defaults are those of diffusers' class, which `medium` has."""

    kind: str = "stable_audio_3"
    """Marks these sizes as those of a `StableAudio3DiT` in files; it is always `stable_audio_3`."""
    channels: int = 256
    """Channels of the latents that the DiT takes and returns."""
    width: int = 1536
    """Features of a token."""
    depth: int = 24
    """Number of Transformer blocks."""
    heads: int = 24
    """Attention heads; each head has width / heads features, and RoPE turns half of them."""
    hidden_factor: float = 4.0
    """Features of the MLPs' hidden layer per feature of a token."""
    differential: bool = True
    """Whether an attention is the difference of two, which share their values (arXiv 2410.05258)."""
    memory_tokens: int = 64
    """Learned tokens before those of the latents, for information that belongs to no frame."""
    time_features: int = 256
    """Fourier features of the noise level."""
    text_width: int = 768
    """Features of a text token and of the embedded duration, which modulates each block and is a token of the text."""
    text_tokens: int = STABLE_AUDIO_3_TEXT_TOKENS
    """Text tokens per caption; a learned token fills up shorter captions."""
    inpainting_width: int = 257
    """Features of a frame that is given for inpainting: its latents and a flag. No frame is given here."""
    seconds_features: int = 256
    """Fourier features of the duration."""
    shortest_seconds: float = 0.0
    """Lower bound that the duration is clamped to, in seconds."""
    longest_seconds: float = 384.0
    """Upper bound that the duration is clamped to, in seconds."""
    frame_seconds: float = 4096 / 44100
    """Duration of a latent frame in seconds."""

    def __post_init__(self) -> None:
        sizes = ("channels", "width", "depth", "heads", "time_features", "text_width", "text_tokens")
        problems = list(sizes_out_of_range(self, (*sizes, "inpainting_width", "seconds_features")))
        problems += sizes_out_of_range(self, ("memory_tokens",), least=0)
        if not problems and self.width % (2 * self.heads):
            problems.append(
                f"width {self.width} does not split into {self.heads} heads: take a multiple of {2 * self.heads}"
            )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def head_width(self) -> int:
        """Features of an attention head."""
        return self.width // self.heads

    @property
    def patch_size(self) -> int:
        """Latent frames per token."""
        return 1
