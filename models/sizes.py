"""The dataclasses of sizes and settings that the models are built from. Importing this module needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

from models.documents import Positive, build, damaged, fits
from models.later_fields import added_later, since
from models.ranges import LARGEST_SIZE, ranged, sizes_out_of_range
from models.stable_audio_sizes import StableAudio3Config, StableAudioConfig

_MOST_STEPS = 100_000
"""The largest number of steps of the sampler."""
_POOLS, _STARTS = ("places", "average"), ("pca", "random")
_MEND = "export it again"


@dataclass
class DiTConfig:
    """Size and shape of a `DiT`."""

    channels: int = ranged(128, least=1)
    """Channels of the latents that the DiT takes and returns."""
    width: int = ranged(384, least=1)
    """Features of a token."""
    depth: int = ranged(8, least=1)
    """Total number of Transformer blocks, multi-stream and single-stream."""
    multistream_depth: int = ranged(4, least=0)
    """Number of blocks, counted from the first, that are multi-stream; there are none if `text_width` is None."""
    heads: int = ranged(6, least=1)
    """Attention heads; each head has width / heads features."""
    hidden_width: int = ranged(1536, least=1)
    """Features of the MLPs' hidden layer, usually 4 × width."""
    text_width: int | None = ranged(None, least=1)
    """Features of a text token from the text encoder; None builds a DiT without a text stream."""
    text_tokens: int = ranged(77, least=1)
    """Text tokens per caption; learned pad tokens fill up shorter captions."""
    patch_size: int = ranged(1, least=1)
    """Latent frames per token."""
    memory_tokens: int = ranged(1, least=0)
    """Extra tokens in the latent stream for information that belongs to no frame; they share one learned vector."""
    rotary_width: int | None = ranged(None, least=0)
    """Features of a head that RoPE rotates; the other features carry no position. None rotates all features."""
    rotary_base: float = ranged(10000.0, least=1)
    """RoPE's base: the slowest feature makes one turn in about 2π · base tokens."""
    rotary_span: int = ranged(501, least=1)
    """Tokens over which the memory tokens are spread evenly; longer inputs work, too."""
    yarn_trained_tokens: int | None = ranged(None, least=1)
    """Tokens that RoPE spanned before YaRN stretched it to `rotary_span` (arXiv 2309.00071); None does not stretch."""
    yarn_factor: float = ranged(40.0, above=0)
    """Factor by which YaRN slows down RoPE's slowest frequencies."""
    time_features: int = ranged(256, least=2)
    """Fourier features of the noise level."""
    gated_skip: bool = False
    """Whether the DiT predicts `output(h) + skip(h) · x`, where the tokens h gate each number of the input x. The skip
    carries what the tokens are too narrow for, in small models whose patches are wider than `width`."""
    predicts_logvar: bool = False
    """Whether `DiT.logvar` is built: a learned log-variance of the loss at a noise level (arXiv 2312.02696, eq. 14)."""

    @property
    def head_width(self) -> int:
        """Features of one attention head."""
        return self.width // self.heads

    @property
    def multistream_blocks(self) -> int:
        """Number of multi-stream blocks that are built: 0 without a text stream."""
        return 0 if self.text_width is None else self.multistream_depth

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ValueError("; ".join(problems))

    def _problems(self) -> Iterator[str]:
        sizes = ("channels", "width", "depth", "heads", "hidden_width", "text_tokens", "patch_size", "rotary_span")
        sizes += ("time_features", *(("text_width",) if self.text_width is not None else ()))
        out_of_range = list(sizes_out_of_range(self, sizes))
        if out_of_range:
            yield from out_of_range
            return
        if self.width % (2 * self.heads):
            yield f"width {self.width} does not split into {self.heads} heads: take a multiple of {2 * self.heads}"
        elif self.rotary_width not in (None, *range(0, self.head_width + 1, 2)):
            yield f"rotary_width is {self.rotary_width}: take an even number up to {self.head_width}, the head width"
        if self.text_width is not None and not 0 <= self.multistream_depth <= self.depth:
            yield f"multistream_depth is {self.multistream_depth}: give a number from 0 to {self.depth}, the depth"
        if self.time_features < 2 or self.time_features % 2:
            yield f"time_features is {self.time_features}: take an even number, for as many cosines as sines"
        if not 0 <= self.memory_tokens <= self.rotary_span:
            yield (
                f"memory_tokens is {self.memory_tokens}: give a number from 0 to {self.rotary_span}, the rotary_span"
            )


@dataclass
class WooshFlowMapConfig(DiTConfig):
    """Size and shape of a `WooshFlowMap`: those of the DiT that it was distilled from."""

    kind: str = "woosh_flow_map"
    """Marks these sizes as those of a `WooshFlowMap` in files; it is always `woosh_flow_map`."""


DecoderConfig = DiTConfig | StableAudioConfig | StableAudio3Config
_RELEASED: dict[str, type[DecoderConfig]] = {
    kind.kind: kind for kind in (StableAudioConfig, StableAudio3Config, WooshFlowMapConfig)
}
"""The sizes of public releases, by the `kind` that marks them in files."""


def decoder_config(values: Any, where: object = "the config of D") -> DecoderConfig:
    """Rebuild the config from what `dataclasses.asdict` returned for it.

    Raises:
        ValueError: a name is unknown, or a value is of another type; the message begins with `where`.
    """
    named = values.get("kind") if isinstance(values, Mapping) else None
    kind = _RELEASED.get(named, DiTConfig) if isinstance(named, str) else DiTConfig
    return build(kind, values, where, mend=_MEND)


def block_counts(config: DecoderConfig) -> tuple[int, int]:
    """Return the number of multi-stream Transformer blocks and the number of all other blocks."""
    if isinstance(config, DiTConfig):
        return config.multistream_blocks, config.depth - config.multistream_blocks
    return 0, config.depth


def with_blocks(config: DecoderConfig, counts: tuple[int, int]) -> DecoderConfig:
    """Return the same sizes with `counts` blocks, as `block_counts` counts them; at least one block remains."""
    depth = max(1, sum(counts))
    if isinstance(config, DiTConfig):
        return dataclasses.replace(config, depth=depth, multistream_depth=counts[0])
    return dataclasses.replace(config, depth=depth)


@dataclass
class LatentEncoderConfig:
    """Sizes of the latent encoder g and the upsampler f."""

    latent_channels: int = ranged(128, least=1)
    """Channels of the AudioAE's latents x0."""
    z_channels: int = ranged(64, least=1)
    """Channels of z; the paper uses 64 at every rate."""
    pooling: int = ranged(9, least=1)
    """Frames of x0 per vector z. At 100 Hz, 4 gives 25 Hz (30×), 9 gives 11.1 Hz (68×) and 100 gives 1 Hz (750×)."""
    patch_size: int = ranged(1, least=1)
    """Frames of x0 per token of g and f. The paper uses 1; more is cheaper. It must divide `pooling`."""
    width: int = ranged(512, least=1)
    """Features of a token in the Transformer blocks."""
    encoder_depth: int = ranged(4, least=0)
    """Number of Transformer blocks in g."""
    upsampler_depth: int = ranged(2, least=0)
    """Number of Transformer blocks in f."""
    heads: int = ranged(8, least=1)
    """Attention heads; `width / heads` must be even."""
    magnitudes: bool = False
    """Whether g sees |x0| in addition to x0. In signed spectra, such as the latents of `spectral`, the sound is in the
    magnitudes and the signs are noise; without |x0|, g spends most of a short training on learning that."""
    pool: str = since("places", before="average")
    """`places`: the tokens of a z are projected together, with weights for each place, and f spreads z the same way;
    `average`: all places share their weights and are averaged, as in the paper."""
    start: str = since("pca", before="random")
    """`pca`: z starts as the principal components of a block's features, to which g adds; `random`: from g alone."""
    whitening: float = ranged(0.0, least=0, most=1, metadata=added_later(0.0))
    """`start=pca`: each component is divided by its standard deviation to this power; 1 makes all variances equal. 0
    keeps those of the data, so that codes are spent on what varies most: at 16 bits a z, log-mel is 0.5 dB better than
    with 0.5."""

    signed_channels: int = ranged(0, least=0, metadata=added_later(0))
    """`start=pca`: channels of x0, counted from the first, of which z starts from the magnitudes, because their signs
    are noise. The AudioAE says how many there are."""

    @property
    def frame_features(self) -> int:
        """Numbers that g sees of a frame."""
        return self.latent_channels * (2 if self.magnitudes else 1)

    @property
    def block_features(self) -> int:
        """Features of the frames of one z, from which z starts."""
        return self.latent_channels * self.pooling

    @property
    def tokens_per_z(self) -> int:
        """Tokens of g and f per vector z."""
        return self.pooling // self.patch_size

    @property
    def place_width(self) -> int:
        """Features of a token that have weights of their own for each place: enough for z, however wide a token is."""
        return min(self.width, 2 * self.z_channels)

    @property
    def pooled_width(self) -> int:
        """Features that g projects to a vector z."""
        return self.width if self.pool == "average" else self.tokens_per_z * self.place_width

    def problems(self) -> list[str]:
        """Return one line for each problem with these sizes, which says how to fix it."""
        sizes = ("latent_channels", "z_channels", "pooling", "patch_size", "width", "heads")
        depths = sizes_out_of_range(self, ("encoder_depth", "upsampler_depth"), least=0)
        if out_of_range := [*sizes_out_of_range(self, sizes), *depths]:
            return [f"latent_encoder.{line}" for line in out_of_range]  # the checks below divide by these sizes
        found = []
        if self.pooling % self.patch_size:
            divisors = [n for n in range(1, self.pooling + 1) if self.pooling % n == 0]
            found.append(
                f"latent_encoder.patch_size={self.patch_size} does not divide latent_encoder.pooling={self.pooling}: "
                f"take one of {divisors}"
            )
        if self.width % (2 * self.heads):
            found.append(
                f"latent_encoder.width={self.width} is not a multiple of 2·heads: take a multiple of {2 * self.heads}"
            )
        for name, kinds in (("pool", _POOLS), ("start", _STARTS)):
            if (value := getattr(self, name)) not in kinds:
                found.append(f"latent_encoder.{name}={value} is unknown: set one of {', '.join(kinds)}")
        return found


@dataclass
class Sampling:
    """Settings of D's sampler when it decodes."""

    sampler: str = "dpmpp"
    """`euler`, `heun` or `dpmpp` (DPM-Solver++ 2M)."""
    steps: int = ranged(16, least=1, most=_MOST_STEPS)
    """Steps of the sampler; `heun` calls D twice per step, the others once."""
    guidance: float = ranged(1.0)
    """Scale of classifier-free guidance by z; 1 turns guidance off."""
    temperature: float = ranged(1.0, above=0)
    """Factor on the noise that sampling starts from. Below 1, decodes of the same codes differ less and stay closer to
    the most likely sound."""


class AutoencoderChoice(TypedDict):
    """The AudioAE of a codec or of a set of latents: the arguments of `load_autoencoder`."""

    kind: str
    folder: NotRequired[str | None]


class Formulation(TypedDict):
    """The name of a formulation of diffusion, and the options that `make_diffusion` takes."""

    name: str
    options: dict[str, float]


LORA_VARIANTS = ("plain", "rslora", "dora", "pissa")
"""The variants of LoRA, see `models.lora`."""


class _Lora(TypedDict):
    rank: Positive
    alpha: float
    variant: NotRequired[Literal["rslora", "dora", "pissa"]]


class _CodecValues(TypedDict):
    """The values of a `CodecConfig` in a file; `from_dict` checks those without a type of their own here."""

    autoencoder: AutoencoderChoice
    latent_encoder: dict[str, Any]
    dit: dict[str, Any]
    diffusion: Formulation
    lora: _Lora
    window: Positive
    rates: NotRequired[list[Positive]]
    sampling: NotRequired[dict[str, Any]]


@dataclass
class CodecConfig:
    """Everything that an SPresso is built from, except its weights."""

    autoencoder: dict[str, Any]
    """`kind` and `folder` (or None) of the AudioAE."""
    latent_encoder: LatentEncoderConfig
    dit: DecoderConfig
    diffusion: dict[str, Any]
    """`name` and `options` of the diffusion's formulation."""
    lora: dict[str, Any]
    """`rank` and `alpha` of D's LoRA, and its `variant` unless that is plain."""
    window: int
    """Frames of x0 that g and D see at once: the length of training's crops, a multiple of the pooling."""
    rates: list[int] = field(default_factory=list)
    """Numbers of codebooks that D was finetuned for, in descending order."""
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def from_dict(cls, values: Any, where: object = "the config of the codec") -> CodecConfig:
        """Rebuild the config from what `dataclasses.asdict` returned for it.

        Raises:
            ValueError: a name is missing or unknown, or a value can't be one of a codec; the message begins with
                `where`.
        """
        fits(values, _CodecValues, where, mend=_MEND)
        latent_encoder = build(LatentEncoderConfig, values["latent_encoder"], where, mend=_MEND)
        sampling = build(Sampling, values.get("sampling", {}), where, mend=_MEND)
        parts = {"latent_encoder": latent_encoder, "sampling": sampling, "dit": decoder_config(values["dit"], where)}
        if unknown := values.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise damaged(where, f"it has an unknown field `{min(unknown)}`", _MEND)
        config = cls(**values | parts)
        if problems := [*latent_encoder.problems(), *config._problems()]:
            raise damaged(where, "; ".join(problems), _MEND)
        return config

    def _problems(self) -> Iterator[str]:
        sampling, pooling = self.sampling, self.latent_encoder.pooling
        if self.window % pooling or self.window > LARGEST_SIZE:
            yield f"window is {self.window}, not a multiple of the pooling {pooling} up to {LARGEST_SIZE}"
        if not 1 <= sampling.steps <= _MOST_STEPS:
            yield f"sampling.steps is {sampling.steps}, not between 1 and {_MOST_STEPS}"
        if foreign := self.autoencoder.keys() - {"kind", "folder"}:
            yield f"autoencoder has an unknown field `{min(foreign)}`"
        if foreign := self.lora.keys() - {"rank", "alpha", "variant"}:
            yield f"lora has an unknown field `{min(foreign)}`"
