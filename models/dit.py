"""The decoder D: a diffusion Transformer over latents, with an optional text stream.

The first blocks are multi-stream: latents and text have separate weights and share one attention (Esser et al., arXiv
2403.03206). The following single-stream blocks use the same weights for both. The architecture is that of the public
Woosh release (arXiv 2604.01929), so that its weights only have to be renamed (`models.backbones.woosh`).

Shape suffixes: B batch, C latent channels, T frames, N latent tokens (T / patch_size), S all tokens of a sequence,
D width, H heads, K features of a head, E features of a patch.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.fused.heads import ProjectedTokens, attention
from models.fused.norm import gated_sum, modulated, sum_modulated
from models.rotary import Rotary, rope_frequencies, yarn
from models.sizes import DiTConfig


def rotaries(config: DiTConfig, latent_tokens: int, *, device: torch.device) -> tuple[Rotary, Rotary]:
    """Return RoPE's angles for the multi-stream and for the single-stream blocks.

    The tokens are memory, latent and text tokens, in this order. Memory tokens are spread over the span. In the
    multi-stream blocks all text tokens have position 0. In the single-stream blocks they follow the latents, but those
    beyond the span have position 0. The weights of the public Woosh release depend on these positions.
    """
    spacing = config.rotary_span // max(config.memory_tokens, 1)
    memory = spacing // 2 + spacing * torch.arange(config.memory_tokens, device=device)
    latent = torch.arange(latent_tokens, device=device)
    text = latent_tokens + torch.arange(0 if config.text_width is None else config.text_tokens, device=device)
    multi = torch.cat((memory, latent, torch.zeros_like(text)))
    single = torch.cat((memory, latent, text * (text < config.rotary_span)))
    # The angles of both are computed together: on a GPU, each operation is a kernel.
    both = Rotary.at(torch.cat((multi, single)), _frequencies(config, device))
    of_multi, of_single = both.split((len(multi), len(single)))
    return of_multi, of_single


def _frequencies(config: DiTConfig, device: torch.device) -> Tensor:
    base, trained_tokens = config.rotary_base, config.yarn_trained_tokens
    turning = config.head_width if config.rotary_width is None else config.rotary_width
    frequencies = rope_frequencies(config.head_width, base=base, turning=turning, device=device)
    if trained_tokens is None or trained_tokens >= config.rotary_span:
        return frequencies
    return yarn(frequencies, base=base, trained_tokens=trained_tokens, factor=config.yarn_factor)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of queries or keys in the dtype of its weight, even if autocast has cast the input to half precision."""

    def forward(self, x_BSHK: Tensor) -> Tensor:
        """Normalise each head's features; return the input's shape."""
        return super().forward(x_BSHK.type_as(self.weight))


class TokenStream(nn.Module):
    """One stream's weights in a multi-stream block: projections to and from the shared attention, and an MLP."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_modulation = nn.Linear(width, 3 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = HeadNorm(config.head_width, eps=1e-6)
        self.norm_k = HeadNorm(config.head_width, eps=1e-6)
        self.attention_out = nn.Linear(width, width)
        self.mlp_modulation = nn.Linear(width, 3 * width)
        self.mlp_in = nn.Linear(width, config.hidden_width)
        self.mlp_out = nn.Linear(config.hidden_width, width)

    def attention_inputs(self, x_BSD: Tensor, time_B1D: Tensor) -> tuple[Tensor, ProjectedTokens, Tensor]:
        """Return x for later use, the projected queries, keys and values, and the gate for the attention's output."""
        shift, scale, gate = self.attention_modulation(time_B1D).chunk(3, -1)
        x_BSD, h_BSD = modulated(x_BSD, shift, scale)
        return x_BSD, ProjectedTokens(self.qkv(h_BSD), self.norm_q, self.norm_k), gate

    def finish(self, x_BSD: Tensor, attended_BSD: Tensor, gate_B1D: Tensor, time_B1D: Tensor) -> Tensor:
        """Add the gated attention output, then the gated MLP output, to the stream; return the input's shape."""
        shift, scale, gate = self.mlp_modulation(time_B1D).chunk(3, -1)
        x_BSD, h_BSD = sum_modulated(x_BSD, self.attention_out(attended_BSD), gate_B1D, shift, scale)
        hidden = F.gelu(self.mlp_in(h_BSD), approximate="tanh")
        return gated_sum(x_BSD, self.mlp_out(hidden), gate)


class MultiStreamBlock(nn.Module):
    """A Transformer block in which latents and text have separate weights and share one attention."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.latent = TokenStream(config)
        self.text = TokenStream(config)

    def forward(self, x_BSD: Tensor, text_BSD: Tensor, time_B1D: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Apply the block to the latent and the text stream; return both in their input shapes."""
        x_BSD, x_stream, x_gate = self.latent.attention_inputs(x_BSD, time_B1D)
        text_BSD, text_stream, text_gate = self.text.attention_inputs(text_BSD, time_B1D)
        attended = attention((x_stream, text_stream), self.latent.heads, rotary)
        x_attended, text_attended = attended.split((x_BSD.shape[1], text_BSD.shape[1]), 1)
        x_BSD = self.latent.finish(x_BSD, x_attended, x_gate, time_B1D)
        return x_BSD, self.text.finish(text_BSD, text_attended, text_gate, time_B1D)


class SingleStreamBlock(nn.Module):
    """A Transformer block with one set of weights for all tokens; attention and MLP are parallel (arXiv 2302.05442)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width, hidden = config.width, config.hidden_width
        self.heads = config.heads
        self.parts = (3 * width, hidden)
        self.modulation = nn.Linear(width, 3 * width)
        self.qkv_mlp = nn.Linear(width, 3 * width + hidden)
        self.norm_q = HeadNorm(config.head_width, eps=1e-6)
        self.norm_k = HeadNorm(config.head_width, eps=1e-6)
        self.out = nn.Linear(width + hidden, width)

    def forward(self, x_BSD: Tensor, time_B1D: Tensor, rotary: Rotary) -> Tensor:
        """Apply the block; return the input's shape."""
        shift, scale, gate = self.modulation(time_B1D).chunk(3, -1)
        x_BSD, h_BSD = modulated(x_BSD, shift, scale)
        qkv, hidden = self.qkv_mlp(h_BSD).split(self.parts, -1)
        attended = attention((ProjectedTokens(qkv, self.norm_q, self.norm_k),), self.heads, rotary)
        both = torch.cat((attended, F.gelu(hidden, approximate="tanh")), -1)
        return gated_sum(x_BSD, self.out(both), gate)


class FourierFeatures(nn.Module):
    """Cosines and sines of a number at learned frequencies: `(B,) → (B, features)`, always in float32."""

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features // 2, 1))

    def forward(self, t_B: Tensor) -> Tensor:
        """Return the features `(B, features)` of the numbers `t`."""
        angles = 2 * math.pi * t_B.float()[:, None] * self.weight.float()[:, 0]
        return torch.cat((angles.cos(), angles.sin()), -1)


class DiT(nn.Module):
    """The diffusion Transformer D.

    D computes in the dtype of its weights (or autocast's), casts its inputs itself and returns the dtype of `x`. Pass
    `x` and `t` in float32 whatever the dtype of the weights: half precision would round `t` (with FSDP, set
    `cast_forward_inputs=False`).

    The modules in `blocks` are independent, so that each can be checkpointed, compiled or sharded by itself. D has no
    buffers: a model built on the meta device only needs `to_empty` and `reset_parameters`.
    """

    lora_targets: ClassVar = ("qkv", "attention_out", "mlp_in", "mlp_out", "qkv_mlp", "out", "output", "skip")
    """Names of the linear layers that LoRA adapts: attention, MLPs and the last layer, not the modulation."""
    diffusion: dict[str, Any] | None = None
    """`name` and `options` of the diffusion formulation that the weights were trained with; None if unknown."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width, hidden = config.width, config.hidden_width
        self.input = nn.Linear(config.channels * config.patch_size, width)
        self.time_features = FourierFeatures(config.time_features)
        self.time_embed = _two_layers(config.time_features, hidden, width)
        if config.text_width is not None:
            self.text_embed = _two_layers(config.text_width, hidden, width)
            self.text_pad = nn.Parameter(torch.empty(config.text_tokens, config.text_width))
        if config.memory_tokens:
            self.memory = nn.Parameter(torch.empty(1, 1, width))
        multi = config.multistream_blocks
        self.blocks = nn.ModuleList(
            MultiStreamBlock(config) if index < multi else SingleStreamBlock(config) for index in range(config.depth)
        )
        self.output_modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, config.channels * config.patch_size)
        if config.gated_skip:
            self.skip = nn.Linear(width, config.channels * config.patch_size)
        if config.predicts_logvar:
            self.logvar_features = FourierFeatures(config.time_features)
            self.logvar_embed = _two_layers(config.time_features, 128, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights; zero gates and output make each block the identity (adaLN-Zero, arXiv 2212.09748)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                starts_at_zero = name in ("output", "skip") or name.endswith("modulation")
                nn.init.zeros_(module.weight) if starts_at_zero else nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, FourierFeatures):
                nn.init.normal_(module.weight)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()
        for learned_tokens in self.parameters(recurse=False):
            nn.init.normal_(learned_tokens, std=0.02)

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
            x: noised latents `(B, C, T)`, where T is a multiple of `patch_size`.
            t: noise level `(B,)`, as the diffusion's formulation defines it.
            text: text tokens `(B, text_tokens, text_width)`; None is unconditional, with learned pad tokens only.
            text_mask: `(B, text_tokens)`, 1 where `text` holds a token and 0 where a learned pad token replaces it;
                None uses all tokens of `text`.
            condition: `(B, width, T / patch_size)`, added to the projected latents.
            time_shift: `(B, width)`, added to the embedding of the noise level; see `models.flow_map`.

        Raises:
            ValueError: a shape does not fit, or the model has no text stream and `text` is given.
        """
        self._check(x, t, text, text_mask, condition)
        patches_BNE = self._to_patches(x)
        x_BSD = self._embed_latents(patches_BNE, condition)
        text_BSD = self._embed_text(text, text_mask, batch=len(x))
        time_BD = self.embed_time(t)
        if time_shift is not None:
            time_BD = time_BD + time_shift.type_as(time_BD)
        time_B1D = F.silu(time_BD)[:, None]
        x_BSD = self._run_blocks(x_BSD, text_BSD, time_B1D)
        shift, scale = self.output_modulation(time_B1D).chunk(2, -1)
        _, h_BND = modulated(x_BSD[:, self.config.memory_tokens :], shift, scale)
        predicted_BNE = self.output(h_BND)
        if self.config.gated_skip:
            predicted_BNE = predicted_BNE + self.skip(h_BND) * patches_BNE
        return self._from_patches(predicted_BNE).to(x.dtype)

    def embed_time(self, t: Tensor) -> Tensor:
        """Embed noise levels `t (B,)`, before the last activation: `(B, width)` in the dtype of the weights."""
        return self.time_embed(self.time_features(t).type_as(self.input.weight))

    def logvar(self, t: Tensor) -> Tensor:
        """Predict the log-variance `(B,)` of the loss at noise levels `t (B,)`; needs `predicts_logvar=True`."""
        if not self.config.predicts_logvar:
            raise ValueError("this DiT has no logvar: build it with predicts_logvar=True")
        return self.logvar_embed(self.logvar_features(t).type_as(self.logvar_embed[0].weight))[:, 0]

    def _run_blocks(self, x_BSD: Tensor, text_BSD: Tensor | None, time_B1D: Tensor) -> Tensor:
        multi, tokens = self.config.multistream_blocks, x_BSD.shape[1]
        multi_rotary, single_rotary = rotaries(self.config, tokens - self.config.memory_tokens, device=x_BSD.device)
        for block in islice(self.blocks, multi):
            x_BSD, text_BSD = block(x_BSD, text_BSD, time_B1D, multi_rotary)
        if text_BSD is not None:
            x_BSD = torch.cat((x_BSD, text_BSD), 1)
        for block in islice(self.blocks, multi, None):
            x_BSD = block(x_BSD, time_B1D, single_rotary)
        return x_BSD[:, :tokens]

    def _to_patches(self, x_BCT: Tensor) -> Tensor:
        patches_BNE = x_BCT.unflatten(2, (-1, self.config.patch_size)).permute(0, 2, 3, 1).flatten(2)
        return patches_BNE.to(self.input.weight.dtype)

    def _embed_latents(self, patches_BNE: Tensor, condition_BDN: Tensor | None) -> Tensor:
        tokens_BND = self.input(patches_BNE)
        if condition_BDN is not None:
            tokens_BND = tokens_BND + condition_BDN.transpose(1, 2).type_as(tokens_BND)
        if not self.config.memory_tokens:
            return tokens_BND
        memory = self.memory.expand(len(tokens_BND), self.config.memory_tokens, -1)
        return torch.cat((memory.type_as(tokens_BND), tokens_BND), 1)

    def _from_patches(self, patches_BNE: Tensor) -> Tensor:
        patches_BNpC = patches_BNE.unflatten(2, (self.config.patch_size, self.config.channels))
        return patches_BNpC.permute(0, 3, 1, 2).flatten(2)

    def _embed_text(self, text: Tensor | None, text_mask: Tensor | None, *, batch: int) -> Tensor | None:
        if self.config.text_width is None:
            return None
        if text is None:
            return self.text_embed(self.text_pad[None]).expand(batch, -1, -1)
        text = text.type_as(self.text_pad)
        if text_mask is not None:
            text = torch.where(text_mask[..., None].bool(), text, self.text_pad)
        return self.text_embed(text)

    def _check(
        self, x: Tensor, t: Tensor, text: Tensor | None, text_mask: Tensor | None, condition: Tensor | None
    ) -> None:
        config = self.config
        if x.ndim != 3 or x.shape[1] != config.channels or not x.is_floating_point():
            raise ValueError(f"x is {_describe(x)}: the DiT takes floats of shape (batch, {config.channels}, frames)")
        if x.shape[2] == 0 or x.shape[2] % config.patch_size:
            raise ValueError(
                f"{x.shape[2]} frames are not a multiple of patch_size {config.patch_size}: "
                "crop or pad the latents, or build the DiT with patch_size=1"
            )
        batch, tokens = len(x), x.shape[2] // config.patch_size
        _expect("t", t, (batch,))
        _expect("condition", condition, (batch, config.width, tokens))
        if config.text_width is None and text is not None:
            raise ValueError("this DiT has no text stream: set text_width in its config, or pass text=None")
        if text is None and text_mask is not None:
            raise ValueError("text_mask without text: give both, or neither")
        if text is not None:
            _expect("text", text, (batch, config.text_tokens, config.text_width))
            _expect("text_mask", text_mask, (batch, config.text_tokens))


def _two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def _expect(name: str, value: Tensor | None, shape: tuple[int | None, ...]) -> None:
    if value is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name} is {_describe(value)}: it must be {shape}")


def _describe(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
