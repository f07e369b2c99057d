"""The latent encoder g and the upsampler f of S-PRESSO (arXiv 2602.15082, section 2, figure 1).

g compresses the audio autoencoder's latents x0 to z, which has only a few vectors per second; f upsamples z to the
decoder D's tokens, where D takes it as its condition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.rotary import Rotary, rope_frequencies
from models.sizes import LatentEncoderConfig

MEAN_MAGNITUDE = 0.8  # the mean of |x| for a standard normal x is √(2/π)


class RotarySelfAttention(nn.Module):
    """Multi-head self-attention over (B, T, width) with rotary position embeddings."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        """Attend from all tokens to all tokens; return the input's shape."""
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
    """Pre-norm Transformer block: self-attention and a feed-forward network, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = RotarySelfAttention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTW: Tensor) -> Tensor:
        """Apply the block; return the input's shape."""
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
        """Encode x0 to z; raise ValueError if T is not a multiple of the pooling."""
        if x0_BCT.shape[-1] % self.config.pooling:
            raise ValueError(
                f"{x0_BCT.shape[-1]} frames are not a multiple of the pooling {self.config.pooling}: "
                "crop or pad the latents to a multiple of it"
            )
        if self.config.magnitudes:
            x0_BCT = torch.cat([x0_BCT, x0_BCT.abs() - MEAN_MAGNITUDE], dim=1)
        h_BTW = self.project_in(_to_patches(x0_BCT, self.config.patch_size))
        for block in self.blocks:
            h_BTW = block(h_BTW)
        z_BTZ = self.project_out(self.norm(h_BTW))
        tokens_per_z = self.config.pooling // self.config.patch_size
        return z_BTZ.unflatten(1, (-1, tokens_per_z)).mean(2).transpose(1, 2)


class Upsampler(nn.Module):
    """f: z (B, Z, N) → condition (B, dit width, tokens of the DiT).

    f repeats each z for all of its tokens, refines them by Transformer blocks, and projects them to D's width. The last
    layer is initialised to zero, so that an untrained f leaves a pretrained D's output unchanged.
    """

    def __init__(self, config: LatentEncoderConfig, *, dit_width: int, dit_patch_size: int) -> None:
        super().__init__()
        self.config = config
        self.dit_patch_size = dit_patch_size
        self.project_in = nn.Linear(config.z_channels, config.width)
        # A learned embedding of a token's position within its z; the repeated tokens would otherwise be identical.
        self.place = nn.Parameter(torch.randn(config.pooling // config.patch_size, config.width) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(config.width, config.heads) for _ in range(config.upsampler_depth))
        self.norm = nn.LayerNorm(config.width)
        self.project_out = nn.Linear(config.width, dit_width)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    def forward(self, z_BZN: Tensor) -> Tensor:
        """Upsample z to one condition vector per token of the DiT, for N · pooling frames."""
        h_BNW = self.project_in(z_BZN.transpose(1, 2))
        h_BTW = (h_BNW[:, :, None] + self.place).flatten(1, 2)
        for block in self.blocks:
            h_BTW = block(h_BTW)
        return self._to_dit_tokens(self.project_out(self.norm(h_BTW)).transpose(1, 2))

    def _to_dit_tokens(self, condition_BWT: Tensor) -> Tensor:
        """Resample from tokens of `patch_size` frames to tokens of `dit_patch_size` frames."""
        if self.dit_patch_size == self.config.patch_size:
            return condition_BWT
        frames = condition_BWT.repeat_interleave(self.config.patch_size, dim=-1)
        return F.avg_pool1d(frames, self.dit_patch_size)


def _to_patches(x_BCT: Tensor, patch_size: int) -> Tensor:
    """Group neighbouring frames into patches: (B, C, T) → (B, T / patch, patch · C)."""
    return x_BCT.transpose(1, 2).unflatten(1, (-1, patch_size)).flatten(2)
