"""The latent encoder g and the upsampler f of S-PRESSO (arXiv 2602.15082, section 2, figure 1).

g squeezes the latents x0 of the audio autoencoder into z, few vectors a second; f spreads z back over
the frames and hands it to the decoder D as a condition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.rotary import Rotary, rope_frequencies
from models.sizes import LatentEncoderConfig

MEAN_MAGNITUDE = 0.8  # of a standard normal number: √(2/π)


class RotarySelfAttention(nn.Module):
    """Multi-head self-attention over (B, T, width) with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        """Same shape in and out."""
        q_BTHK, k_BTHK, v_BTHK = self.qkv(x_BTW).unflatten(-1, (3, self.heads, -1)).unbind(2)
        rotary = _rotary(x_BTW.shape[1], q_BTHK.shape[-1], x_BTW.device)
        q_BTHK, k_BTHK = rotary.turn(q_BTHK).type_as(v_BTHK), rotary.turn(k_BTHK).type_as(v_BTHK)
        mixed_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), v_BTHK.transpose(1, 2)
        )
        return self.out(mixed_BHTK.transpose(1, 2).flatten(2))


def _rotary(tokens: int, head_width: int, device: torch.device) -> Rotary:
    frequencies = rope_frequencies(head_width, base=10_000.0, turning=head_width, device=device)
    return Rotary.at(torch.arange(tokens, device=device), frequencies)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, both residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = RotarySelfAttention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTW: Tensor) -> Tensor:
        """Same shape in and out."""
        x_BTW = x_BTW + self.attention(self.attention_norm(x_BTW))
        return x_BTW + self.feed_forward(self.feed_forward_norm(x_BTW))


class LatentEncoder(nn.Module):
    """g: x0 (B, C, T) → z (B, Z, T / pooling): Transformer blocks, a linear layer, average pooling in time."""

    def __init__(self, config: LatentEncoderConfig) -> None:
        super().__init__()
        self.config = config
        features = config.latent_channels * (2 if config.magnitudes else 1)
        self.project_in = nn.Linear(features * config.patch_size, config.width)
        self.blocks = nn.ModuleList(TransformerBlock(config.width, config.heads) for _ in range(config.encoder_depth))
        self.norm = nn.LayerNorm(config.width)
        self.project_out = nn.Linear(config.width, config.z_channels)

    def forward(self, x0_BCT: Tensor) -> Tensor:
        """Encode x0; raises ValueError where T is not a multiple of the pooling."""
        if x0_BCT.shape[-1] % self.config.pooling:
            raise ValueError(
                f"{x0_BCT.shape[-1]} frames do not divide by the pooling of {self.config.pooling}: "
                f"crop or pad them to a multiple of it"
            )
        if self.config.magnitudes:
            x0_BCT = torch.cat([x0_BCT, x0_BCT.abs() - MEAN_MAGNITUDE], dim=1)
        h_BTW = self.project_in(_patches(x0_BCT, self.config.patch_size))
        for block in self.blocks:
            h_BTW = block(h_BTW)
        z_BTZ = self.project_out(self.norm(h_BTW))
        tokens_per_z = self.config.pooling // self.config.patch_size
        return z_BTZ.unflatten(1, (-1, tokens_per_z)).mean(2).transpose(1, 2)


class Upsampler(nn.Module):
    """f: z (B, Z, N) → condition (B, dit width, tokens of the DiT).

    z is repeated over the tokens that it stands for, refined by Transformer blocks, and projected by a layer that
    starts at zero: at the start of step 1 a pretrained D is unchanged.
    """

    def __init__(self, config: LatentEncoderConfig, *, dit_width: int, dit_patch_size: int) -> None:
        super().__init__()
        self.config = config
        self.dit_patch_size = dit_patch_size
        self.project_in = nn.Linear(config.z_channels, config.width)
        # where within its z a token lies: repetition alone would leave that to attention
        self.place = nn.Parameter(torch.randn(config.pooling // config.patch_size, config.width) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(config.width, config.heads) for _ in range(config.upsampler_depth))
        self.norm = nn.LayerNorm(config.width)
        self.project_out = nn.Linear(config.width, dit_width)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, z_BZN: Tensor) -> Tensor:
        """Spread z over N · pooling frames, one condition vector to a token of the DiT."""
        h_BNW = self.project_in(z_BZN.transpose(1, 2))
        h_BTW = (h_BNW[:, :, None] + self.place).flatten(1, 2)
        for block in self.blocks:
            h_BTW = block(h_BTW)
        return self._to_dit_tokens(self.project_out(self.norm(h_BTW)).transpose(1, 2))

    def _to_dit_tokens(self, condition_BWT: Tensor) -> Tensor:
        """From tokens of `patch_size` frames to tokens of `dit_patch_size` frames."""
        if self.dit_patch_size == self.config.patch_size:
            return condition_BWT
        frames = condition_BWT.repeat_interleave(self.config.patch_size, dim=-1)
        return F.avg_pool1d(frames, self.dit_patch_size)


def _patches(x_BCT: Tensor, patch_size: int) -> Tensor:
    """(B, C, T) → (B, T / patch, patch · C)."""
    return x_BCT.transpose(1, 2).unflatten(1, (-1, patch_size)).flatten(2)
