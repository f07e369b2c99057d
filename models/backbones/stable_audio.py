"""The diffusion Transformer of Stable Audio Open (arXiv 2407.14358) as D, loaded from diffusers' layout.

Its conditions are text, by cross-attention, and the start and end in seconds of its window in a longer sound. Here,
every crop is treated as a whole sound. Without text, the cross-attention's input is all zeros, as in the release's
training.

Shape suffixes: B batch, C latent channels, T frames, N text tokens, E features of a text token, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from models.backbones.oobleck import read_oobleck_config
from models.backbones.released import find_part, open_part, read_config, read_json, require, require_package
from models.documents import Size, fits
from models.hub import locate
from models.stable_audio_sizes import STABLE_AUDIO_TEXT_TOKENS, StableAudio3Config, StableAudioConfig
from models.weights import Fill, filled

_CLASS = "StableAudioDiTModel"
PARTS = ("transformer", "projection_model", "scheduler")
"""The subfolders that D is read from."""


class _Settings(TypedDict):
    """The settings of D in diffusers."""

    sample_size: Any
    in_channels: Size
    num_layers: Size
    attention_head_dim: Size
    num_attention_heads: Size
    out_channels: Size
    num_key_value_attention_heads: Size
    cross_attention_dim: Size
    time_proj_dim: Size
    global_states_input_dim: Size
    cross_attention_input_dim: Size


class ProjectionSettings(TypedDict):
    """The settings of the projection of the text and of the seconds."""

    text_encoder_dim: Size
    conditioning_dim: Size
    min_value: float
    max_value: float


class _TokenizerSettings(TypedDict):
    model_max_length: NotRequired[float]


class _SchedulerSettings(TypedDict):
    sigma_data: NotRequired[float]
    sigma_min: NotRequired[float]
    sigma_max: NotRequired[float]


_SCHEDULER = "CosineDPMSolverMultistepScheduler"
_PROJECTION = "projection_model."
_NAMES = {
    "time_features.weight": "time_proj.weight",
    "time_embed": "timestep_proj",
    "seconds_embed": "global_proj",
    "text_embed": "cross_attention_proj",
    "mix_in": "preprocess_conv",
    "input": "proj_in",
    "blocks": "transformer_blocks",
    "output": "proj_out",
    "mix_out": "postprocess_conv",
    "start.features": f"{_PROJECTION}start_number_conditioner.time_positional_embedding.0.weights",
    "start.out": f"{_PROJECTION}start_number_conditioner.time_positional_embedding.1",
    "end.features": f"{_PROJECTION}end_number_conditioner.time_positional_embedding.0.weights",
    "end.out": f"{_PROJECTION}end_number_conditioner.time_positional_embedding.1",
}


class FlatFourierFeatures(nn.Module):
    """Cosines, then sines, of a number at learned frequencies: `(B,) → (B, features)`, always in float32."""

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features // 2))

    def forward(self, t_B: Tensor) -> Tensor:
        """Return the features `(B, features)` of the numbers `t`."""
        angles = 2 * math.pi * t_B.float()[:, None] * self.weight.float()
        return torch.cat((angles.cos(), angles.sin()), -1)


class Seconds(nn.Module):
    """Embeds a time in seconds as a token `(B, 1, E)`, by its fraction of a range and Fourier features of that."""

    def __init__(self, config: StableAudioConfig):
        super().__init__()
        self.shortest, self.longest = config.shortest_seconds, config.longest_seconds
        self.features = nn.Parameter(torch.empty(config.seconds_features // 2))
        self.out = nn.Linear(config.seconds_features + 1, config.text_width)

    def forward(self, seconds_B: Tensor) -> Tensor:
        """Return the token `(B, 1, E)` of the times `seconds_B`."""
        fraction = ((seconds_B - self.shortest) / (self.longest - self.shortest)).clamp(0, 1)[:, None]
        angles = fraction * self.features.float() * 2 * math.pi
        features = torch.cat((fraction, angles.sin(), angles.cos()), -1)
        return self.out(features.to(self.out.weight.dtype))[:, None]


class StableAudioDiT(nn.Module):
    """Wraps the modules of diffusers' `StableAudioDiTModel` in the interface of `models.dit.DiT`.

    `condition` is added to the projected latents; if it is zero, the output is identical to the release's.
    """

    lora_targets: ClassVar = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    """Names of the linear layers that LoRA adapts: both attentions and the MLP of each block."""
    diffusion: dict[str, Any] | None = None
    """`name` and `options` of the diffusion formulation that the weights were trained with; None if unknown."""

    def __init__(self, config: StableAudioConfig):
        super().__init__()
        require_package("diffusers", "stable_audio", "Stable Audio Open's diffusion Transformer")
        from diffusers.models.transformers.stable_audio_transformer import StableAudioDiTModel

        self.config = config
        model = StableAudioDiTModel(
            in_channels=config.channels,
            out_channels=config.channels,
            num_layers=config.depth,
            attention_head_dim=config.head_width,
            num_attention_heads=config.heads,
            num_key_value_attention_heads=config.text_heads,
            cross_attention_dim=config.cross_width,
            time_proj_dim=config.time_features,
            global_states_input_dim=2 * config.text_width,
            cross_attention_input_dim=config.text_width,
        )
        self.time_features = FlatFourierFeatures(config.time_features)
        self.time_embed = model.timestep_proj
        self.start, self.end = Seconds(config), Seconds(config)
        self.seconds_embed = model.global_proj
        self.text_embed = model.cross_attention_proj
        self.mix_in, self.input = model.preprocess_conv, model.proj_in
        self.blocks = model.transformer_blocks
        self.output, self.mix_out = model.proj_out, model.postprocess_conv

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        condition: Tensor | None = None,
        time_shift: Tensor | None = None,
    ) -> Tensor:
        """Predict the network's output `(B, C, T)` for noised latents.

        Args:
            x: noised latents `(B, C, T)`, scaled as the diffusion's formulation requires.
            t: noise level `(B,)`, as the diffusion's formulation defines it.
            text: text tokens `(B, text_tokens, text_width)`, projected as in the release; None is unconditional.
            text_mask: `(B, text_tokens)`, 1 where `text` holds a token and 0 elsewhere; a row of zeros is
                unconditional. None uses all tokens of `text`.
            condition: `(B, width, T)`, added to the projected latents.
            time_shift: `(B, width)`, added to the embedding of the noise level; see `models.flow_map`.

        Raises:
            ValueError: a shape does not fit.
        """
        require_shapes(self.config, x, t, text=text, text_mask=text_mask, condition=condition)
        x_BCT = x.to(self.input.weight.dtype)
        x_BTD = self.input((self.mix_in(x_BCT) + x_BCT).transpose(1, 2))
        if condition is not None:
            x_BTD = x_BTD + condition.transpose(1, 2).type_as(x_BTD)
        start, end = self._seconds(len(x), x.shape[2], x.device)
        time_BD = self.time_embed(self.time_features(t).to(self.input.weight.dtype))
        if time_shift is not None:
            time_BD = time_BD + time_shift.type_as(time_BD)
        first_B1D = self.seconds_embed(torch.cat((start, end), 2)) + time_BD[:, None]
        x_BTD = torch.cat((first_B1D, x_BTD), 1)
        cross_BNE = self.text_embed(_cross_inputs(text, text_mask, start, end))
        rotary = self._rotary(x_BTD.shape[1], x.device)
        for block in self.blocks:
            x_BTD = block(x_BTD, None, cross_BNE, None, rotary)
        out_BCT = self.output(x_BTD).transpose(1, 2)[:, :, 1:]
        return (self.mix_out(out_BCT) + out_BCT).to(x.dtype)

    def _seconds(self, batch: int, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the tokens of the start and the end of a sound of `frames` frames."""
        zeros_B = torch.zeros(batch, device=device)
        return self.start(zeros_B), self.end(zeros_B + frames * self.config.frame_seconds)

    def _rotary(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return RoPE's cosines and sines for half of each head's features, as the release's pipeline computes them."""
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        positions: Any = torch.arange(tokens, device=device)  # if given an integer, diffusers computes on the CPU
        width = self.config.head_width // 2
        return get_1d_rotary_pos_embed(width, positions, use_real=True, repeat_interleave_real=False)


def require_shapes(
    config: StableAudioConfig | StableAudio3Config,
    x: Tensor,
    t: Tensor,
    *,
    text: Tensor | None,
    text_mask: Tensor | None,
    condition: Tensor | None,
) -> None:
    """Raise ValueError if an input of a D of these sizes has a shape that does not fit."""
    if x.ndim != 3 or x.shape[1] != config.channels or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)}: this D takes floats of shape (batch, {config.channels}, frames)")
    batch, frames = len(x), x.shape[2]
    expected = {
        "t": (t, (batch,)),
        "text": (text, (batch, config.text_tokens, config.text_width)),
        "text_mask": (text_mask, (batch, config.text_tokens)),
        "condition": (condition, (batch, config.width, frames)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name} is {tuple(value.shape)}: it must be {shape}")
    if text is None and text_mask is not None:
        raise ValueError("text_mask without text: give both, or neither")


def _cross_inputs(text_BNE: Tensor | None, mask_BN: Tensor | None, start_B1E: Tensor, end_B1E: Tensor) -> Tensor:
    """Concatenate the input of cross-attention: text, start and end tokens; zeros for samples without text.

    The cross-attention has no biases, so it returns zeros for any number of zero tokens; if no sample has text, one
    zero token is enough.
    """
    if text_BNE is None:
        return torch.zeros_like(start_B1E)
    text_BNE = text_BNE.type_as(start_B1E)
    if mask_BN is None:
        return torch.cat((text_BNE, start_B1E, end_B1E), 1)
    real_BN = mask_BN.bool()
    whole = torch.cat((torch.where(real_BN[..., None], text_BNE, 0.0), start_B1E, end_B1E), 1)
    return torch.where(real_BN.any(1)[:, None, None], whole, 0.0)


def load_stable_audio(folder: str | Path, fill: Fill = filled) -> StableAudioDiT:
    """Load D from a release's folder or hub name: `transformer/`, and the time embedding in `projection_model/`.

    Raises:
        ValueError: a part is missing or damaged, or is another model.
    """
    config = read_stable_audio_config(folder)
    transformer, projection = find_part(folder, "transformer"), find_part(folder, "projection_model")
    own = {
        f"{_PROJECTION}{name}": value
        for name, value in open_part(projection).items()
        if not name.startswith("text_projection.")  # it belongs to the text encoder, not to D
    }
    dit = fill(lambda: StableAudioDiT(config), own | open_part(transformer), str(transformer), _release_name)
    dit.diffusion = _read_formulation(folder)
    return dit


def read_stable_audio_config(folder: str | Path) -> StableAudioConfig:
    """Read D's sizes without its weights; raises as `load_stable_audio` does."""
    transformer, projection = find_part(folder, "transformer"), find_part(folder, "projection_model")
    given = read_config(transformer, _CLASS, _Settings)
    seconds = read_config(projection, "StableAudioProjectionModel", ProjectionSettings)
    autoencoder = read_oobleck_config(folder)
    channels, width = given["in_channels"], seconds["conditioning_dim"]
    require(
        transformer / "config.json",
        {
            "out_channels is in_channels": given["out_channels"] == channels,
            "in_channels is the autoencoder's decoder_input_channels": autoencoder.latent_channels == channels,
            "cross_attention_input_dim is the projection's conditioning_dim": given["cross_attention_input_dim"]
            == width,
            "global_states_input_dim is twice the projection's conditioning_dim": given["global_states_input_dim"]
            == 2 * width,
        },
    )
    return StableAudioConfig(
        channels=channels,
        depth=given["num_layers"],
        heads=given["num_attention_heads"],
        head_width=given["attention_head_dim"],
        text_heads=given["num_key_value_attention_heads"],
        cross_width=given["cross_attention_dim"],
        time_features=given["time_proj_dim"],
        text_width=width,
        text_tokens=text_tokens(folder),
        shortest_seconds=seconds["min_value"],
        longest_seconds=seconds["max_value"],
        frame_seconds=autoencoder.hop / autoencoder.sample_rate,
    )


def text_tokens(folder: str | Path, *, default: int = STABLE_AUDIO_TEXT_TOKENS) -> int:
    """Return the number of tokens to which a release pads or truncates every caption: its tokenizer's, or `default`."""
    settings = locate(folder) / "tokenizer" / "tokenizer_config.json"
    if not settings.is_file():
        return default
    tokens = fits(read_json(settings), _TokenizerSettings, settings, mend="download the release again").get(
        "model_max_length", default
    )
    # transformers writes 10³⁰ for a tokenizer without a maximum length
    return int(tokens) if 0 < tokens < 1e6 else default


def _read_formulation(folder: str | Path) -> dict[str, Any]:
    """Read the diffusion formulation of the weights from the release's scheduler."""
    path = locate(folder) / "scheduler" / "scheduler_config.json"
    given = read_json(path)
    fits(given, _SchedulerSettings, path, mend="download the release again")
    require(
        path,
        {
            f"_class_name is {_SCHEDULER}": given.get("_class_name") == _SCHEDULER,
            "prediction_type is v_prediction": given.get("prediction_type") == "v_prediction",
        },
    )
    defaults = {"sigma_data": 1.0, "sigma_min": 0.3, "sigma_max": 500.0}
    options = {name: float(given[name]) for name, value in defaults.items() if given.get(name, value) != value}
    return {"name": "v_prediction", "options": options}


def _release_name(ours: str) -> str:
    return renamed(ours, _NAMES)


def renamed(ours: str, names: Mapping[str, str]) -> str:
    """Return the release's name for the tensor that is called `ours` here; `names` maps the beginnings of names."""
    for prefix, theirs in names.items():
        if ours == prefix or ours.startswith(f"{prefix}."):
            return theirs + ours.removeprefix(prefix)
    raise AssertionError(ours)
