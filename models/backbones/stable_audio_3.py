"""The diffusion Transformer of Stable Audio 3 (arXiv 2605.17991) as D, loaded from diffusers' layout.

Its conditions are text and the sound's duration in seconds. The text enters by cross-attention, in which the embedded
duration is one more token; the duration also modulates each block, together with the noise level. Here, every crop is
treated as a whole sound. Without text, the cross-attention's input is all zeros, as in the release's training.

The release predicts the velocity from data to noise, and `models.diffusion.FlowMatching` that from noise to data, so
the output's sign is changed here. The time is the same: 0 for data, 1 for noise.

Shape suffixes: B batch, C latent channels, T frames, N text tokens, E features of a text token, S tokens, D width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from models.backbones.released import find_part, open_part, read_config, read_json, require, require_package
from models.backbones.same import read_same_config
from models.backbones.stable_audio import renamed, require_shapes, text_tokens
from models.documents import Natural, Size
from models.float32_buffers import Float32Buffers
from models.hub import locate
from models.stable_audio_sizes import STABLE_AUDIO_3_TEXT_TOKENS, StableAudio3Config
from models.weights import Fill, filled

CLASS = "StableAudio3DiTModel"
"""The name of the class in diffusers, by which a release's folder is known."""
PARTS = ("transformer", "duration_embedder", "scheduler")
"""The subfolders that D is read from."""


class _Settings(TypedDict):
    """The settings of D in diffusers."""

    io_channels: Size
    patch_size: Size
    embed_dim: Size
    depth: Size
    num_heads: Size
    cond_token_dim: Size
    global_cond_dim: Size
    local_add_cond_dim: Size
    timestep_features_dim: Size
    ff_mult: float
    num_memory_tokens: Natural
    use_differential_attention: bool


class _DurationSettings(TypedDict):
    """The settings of the embedding of the duration."""

    output_dim: Size
    fourier_dim: Size
    min_val: float
    max_val: float
    min_freq: float
    max_freq: float


_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "StableAudio3EulerScheduler", "PingPongScheduler")
"""The release's scheduler in diffusers, and what the first converted releases called it."""
_DURATION = "duration_embedder."
_NAMES = {
    "time_embed": "to_timestep_embed",
    "text_pad": "prompt_padding_embedding",
    "text_embed": "to_cond_embed",
    "seconds_embed": "to_global_embed",
    "modulation": "global_cond_embedder",
    "mix_in": "preprocess_conv",
    "input": "proj_in",
    "memory": "memory_tokens",
    "turns.frequencies": "rotary_pos_emb.inv_freq",
    "blocks": "transformer_blocks",
    "output": "proj_out",
    "mix_out": "postprocess_conv",
    "seconds.turns.frequencies": f"{_DURATION}freqs",
    "seconds.out": f"{_DURATION}linear",
}


class Frequencies(Float32Buffers):
    """Fixed frequencies, in float32 whatever the precision around them: half of one loses the angles of late tokens."""

    frequencies: Tensor

    def __init__(self, count: int):
        super().__init__()
        self.register_buffer("frequencies", torch.empty(count))


class Duration(nn.Module):
    """Embeds a duration in seconds, by its fraction of a range and Fourier features of that: `(B,) → (B, E)`."""

    def __init__(self, config: StableAudio3Config):
        super().__init__()
        self.shortest, self.longest = config.shortest_seconds, config.longest_seconds
        self.turns = Frequencies(config.seconds_features // 2)
        self.out = nn.Linear(config.seconds_features, config.text_width)

    def forward(self, seconds_B: Tensor) -> Tensor:
        """Return the embedding `(B, E)` of the times `seconds_B`."""
        seconds_B = seconds_B.float().clamp(self.shortest, self.longest)
        fraction_B = (seconds_B - self.shortest) / (self.longest - self.shortest)
        angles = fraction_B[:, None] * self.turns.frequencies[None] * 2.0 * math.pi
        return self.out(torch.cat((angles.cos(), angles.sin()), -1).to(self.out.weight.dtype))


class StableAudio3DiT(nn.Module):
    """Wraps the modules of diffusers' `StableAudio3DiTModel` in the interface of `models.dit.DiT`.

    `condition` is added to the projected latents; if it is zero, the output is the release's with the opposite sign.
    The release also takes frames that are given for inpainting. Its own code always hands them over, as zeros if none
    is given, and the output is not the same without them. Here none is given; one frame of zeros stands for all.
    """

    lora_targets: ClassVar = ("to_qkv", "to_q", "to_kv", "to_out", "ff.proj_in", "ff.proj_out")
    """Names of the linear layers that LoRA adapts: both attentions and the MLP of each block."""
    diffusion: dict[str, Any] | None = None
    """`name` and `options` of the diffusion formulation that the weights were trained with; None if unknown."""

    def __init__(self, config: StableAudio3Config):
        super().__init__()
        require_package("diffusers", "stable_audio", "Stable Audio 3's diffusion Transformer")
        from diffusers.models.transformers.transformer_stable_audio3 import StableAudio3DiTModel

        self.config = config
        model = StableAudio3DiTModel(
            io_channels=config.channels,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            cond_token_dim=config.text_width,
            global_cond_dim=config.text_width,
            local_add_cond_dim=config.inpainting_width,
            timestep_features_dim=config.time_features,
            ff_mult=config.hidden_factor,
            num_memory_tokens=config.memory_tokens,
            use_differential_attention=config.differential,
        )
        self.time_features, self.time_embed = model.timestep_features, model.to_timestep_embed
        self.seconds, self.seconds_embed = Duration(config), model.to_global_embed
        self.modulation = model.global_cond_embedder
        self.text_pad, self.text_embed = model.prompt_padding_embedding, model.to_cond_embed
        self.mix_in, self.input = model.preprocess_conv, model.proj_in
        self.memory = model.memory_tokens if config.memory_tokens else None
        self.turns = Frequencies(len(model.rotary_pos_emb.inv_freq))
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
        """Predict the velocity `(B, C, T)` from noise to data for noised latents.

        Args:
            x: noised latents `(B, C, T)`.
            t: noise level `(B,)`: 0 for data, 1 for noise.
            text: text tokens `(B, text_tokens, text_width)`; None is unconditional.
            text_mask: `(B, text_tokens)`, 1 where `text` holds a token and 0 elsewhere; a row of zeros is
                unconditional. None uses all tokens of `text`.
            condition: `(B, width, T)`, added to the projected latents.
            time_shift: `(B, width)`, added to the embedding of the noise level; see `models.flow_map`.

        Raises:
            ValueError: a shape does not fit.
        """
        require_shapes(self.config, x, t, text=text, text_mask=text_mask, condition=condition)
        dtype, memory = self.input.weight.dtype, self.config.memory_tokens
        x_BCT = x.to(dtype)
        x_BSD = self.input((self.mix_in(x_BCT) + x_BCT).transpose(1, 2))
        if condition is not None:
            x_BSD = x_BSD + condition.transpose(1, 2).type_as(x_BSD)
        if self.memory is not None:
            x_BSD = torch.cat((self.memory.expand(len(x), -1, -1).type_as(x_BSD), x_BSD), 1)
        # What modulates and conditions the blocks: noise level, duration and text.
        seconds_BE = self.seconds(torch.full_like(t, x.shape[2] * self.config.frame_seconds, dtype=torch.float32))
        time_BD = self.time_embed(self.time_features(t.float()[:, None]).to(dtype))
        if time_shift is not None:
            time_BD = time_BD + time_shift.type_as(time_BD)
        modulation_BD = self.modulation(self.seconds_embed(seconds_BE) + time_BD)
        text_BND = self.text_embed(self._cross_inputs(text, text_mask, seconds_BE))
        nothing_given = x_BCT.new_zeros(1, 1, self.config.inpainting_width)
        rotary = self._rotary(x_BSD.shape[1])
        for block in self.blocks:
            x_BSD = block(x_BSD, text_BND, modulation_BD, rotary, None, nothing_given, memory)
        out_BCT = self.output(x_BSD[:, memory:]).transpose(1, 2)
        return -(self.mix_out(out_BCT) + out_BCT).to(x.dtype)

    def _cross_inputs(self, text_BNE: Tensor | None, mask_BN: Tensor | None, seconds_BE: Tensor) -> Tensor:
        """Concatenate the input of cross-attention: text, padded, and the duration; zeros for samples without text.

        The cross-attention has no biases, so it returns zeros for any number of zero tokens; if no sample has text, one
        zero token is enough.
        """
        seconds_B1E = seconds_BE[:, None]
        if text_BNE is None:
            return torch.zeros_like(seconds_B1E)
        text_BNE = text_BNE.type_as(seconds_B1E)
        if mask_BN is None:
            return torch.cat((text_BNE, seconds_B1E), 1)
        real_BN1 = mask_BN.bool()[..., None]
        whole = torch.cat((torch.where(real_BN1, text_BNE, self.text_pad.type_as(text_BNE)), seconds_B1E), 1)
        return torch.where(real_BN1.any(1, keepdim=True), whole, 0.0)

    def _rotary(self, tokens: int) -> Tensor:
        """Return the angles `(tokens, features)` by which RoPE turns half of each head's features."""
        frequencies = self.turns.frequencies
        positions = torch.arange(tokens, device=frequencies.device, dtype=frequencies.dtype)
        angles = torch.outer(positions, frequencies)
        return torch.cat((angles, angles), -1)


def load_stable_audio_3(folder: str | Path, fill: Fill = filled) -> StableAudio3DiT:
    """Load D from a release's folder or hub name: `transformer/`, and the duration's part in `duration_embedder/`.

    Raises:
        ValueError: a part is missing or damaged, or is another model.
    """
    config = read_stable_audio_3_config(folder)
    transformer, duration = find_part(folder, "transformer"), find_part(folder, "duration_embedder")
    _require_scheduler(folder)
    own = {f"{_DURATION}{name}": value for name, value in open_part(duration).items()}
    given = own | open_part(transformer)
    dit = fill(lambda: StableAudio3DiT(config), given, str(transformer), lambda ours: renamed(ours, _NAMES))
    dit.diffusion = {"name": "flow_matching", "options": {}}
    return dit


def read_stable_audio_3_config(folder: str | Path) -> StableAudio3Config:
    """Read D's sizes without its weights; raises as `load_stable_audio_3` does."""
    transformer, duration = find_part(folder, "transformer"), find_part(folder, "duration_embedder")
    given = read_config(transformer, CLASS, _Settings)
    seconds = read_config(duration, "StableAudio3DurationEmbedder", _DurationSettings)
    autoencoder = read_same_config(folder)
    channels, width = given["io_channels"], given["cond_token_dim"]
    require(
        transformer / "config.json",
        {
            "patch_size is 1": given["patch_size"] == 1,
            "io_channels is the autoencoder's latent_dim": autoencoder.latent_channels == channels,
            "global_cond_dim and the duration's output_dim are cond_token_dim": given["global_cond_dim"]
            == seconds["output_dim"]
            == width,
            "max_val of the duration is above its min_val": seconds["max_val"] > seconds["min_val"],
        },
    )
    return StableAudio3Config(
        channels=channels,
        width=given["embed_dim"],
        depth=given["depth"],
        heads=given["num_heads"],
        hidden_factor=given["ff_mult"],
        differential=given["use_differential_attention"],
        memory_tokens=given["num_memory_tokens"],
        time_features=given["timestep_features_dim"],
        text_width=width,
        text_tokens=stable_audio_3_text_tokens(folder),
        inpainting_width=given["local_add_cond_dim"],
        seconds_features=seconds["fourier_dim"],
        shortest_seconds=seconds["min_val"],
        longest_seconds=seconds["max_val"],
        frame_seconds=autoencoder.hop / autoencoder.sample_rate,
    )


def stable_audio_3_text_tokens(folder: str | Path) -> int:
    """Return the number of tokens to which the release pads or truncates every caption."""
    return min(text_tokens(folder, default=STABLE_AUDIO_3_TEXT_TOKENS), STABLE_AUDIO_3_TEXT_TOKENS)


def _require_scheduler(folder: str | Path) -> None:
    """Raise ValueError unless the release's scheduler is that of a rectified flow whose times are from 0 to 1."""
    path = locate(folder) / "scheduler" / "scheduler_config.json"
    given = read_json(path)
    name = given.get("_class_name")
    scaled = name == _SCHEDULERS[0] and given.get("num_train_timesteps") != 1
    require(
        path,
        {
            f"_class_name is one of {', '.join(_SCHEDULERS)}": name in _SCHEDULERS,
            "num_train_timesteps is 1, so that times are from 0 to 1": not scaled,
        },
    )
