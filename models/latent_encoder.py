"""The latent encoder g and the upsampler f of S-PRESSO (arXiv 2602.15082, section 2, figure 1).

g compresses the audio autoencoder's latents x0 to z, which has only a few vectors per second; f upsamples z to the
decoder D's tokens, where D takes it as its condition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.block_pca import BlockPCA
from models.fused.heads import ProjectedTokens, attention
from models.fused.norm import layer_normed, sum_layer_normed
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

    def forward(self, x_BTW: Tensor, rotary: Rotary) -> Tensor:
        """Attend from all tokens to all tokens; return the input's shape."""
        return self.out(attention((ProjectedTokens(self.qkv(x_BTW)),), self.heads, rotary))


def _rotary(config: LatentEncoderConfig, h_BTW: Tensor) -> Rotary:
    head_width = config.width // config.heads
    frequencies = rope_frequencies(head_width, base=10_000.0, turning=head_width, device=h_BTW.device)
    return Rotary.at(torch.arange(h_BTW.shape[1], device=h_BTW.device), frequencies)


class TransformerBlock(nn.Module):
    """Pre-norm Transformer block: self-attention and a feed-forward network, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = RotarySelfAttention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTW: Tensor, rotary: Rotary) -> Tensor:
        """Apply the block; return the input's shape."""
        x_BTW, h_BTW = layer_normed(x_BTW, self.attention_norm)
        x_BTW, h_BTW = sum_layer_normed(x_BTW, self.attention(h_BTW, rotary), self.feed_forward_norm)
        return x_BTW + self.feed_forward(h_BTW)


class LatentEncoder(nn.Module):
    """g: x0 (B, C, T) → z (B, Z, T / pooling).

    z is the sum of a start from the data (`BlockPCA`) and of what the Transformer blocks add. With `pool=places`, the
    tokens of a z are projected together, with weights of their own for each place; with `average`, as in the paper, all
    places share their weights and the mean is taken.
    """

    def __init__(self, config: LatentEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.start = BlockPCA(config.block_features, config.z_channels) if config.start == "pca" else None
        self.project_in = nn.Linear(config.frame_features * config.patch_size, config.width)
        self.blocks = nn.ModuleList(TransformerBlock(config.width, config.heads) for _ in range(config.encoder_depth))
        self.norm = nn.LayerNorm(config.width)
        if config.pool == "places":
            self.narrow = nn.Linear(config.width, config.place_width)
        self.project_out = nn.Linear(config.pooled_width, config.z_channels)
        if self.start is not None:
            nn.init.zeros_(self.project_out.weight)
            nn.init.zeros_(self.project_out.bias)

    def forward(self, x0_BCT: Tensor) -> Tensor:
        """Encode x0 to z; raise ValueError if T is not a multiple of the pooling."""
        config = self.config
        if x0_BCT.shape[-1] % config.pooling:
            raise ValueError(
                f"{x0_BCT.shape[-1]} frames are not a multiple of the pooling {config.pooling}: "
                "crop or pad the latents to a multiple of it"
            )
        h_BTW = self.project_in(_to_patches(_features(x0_BCT, config), config.patch_size))
        rotary = _rotary(config, h_BTW)
        for block in self.blocks:
            h_BTW = block(h_BTW, rotary)
        z_BNZ = self._pooled(layer_normed(h_BTW, self.norm)[1])
        if self.start is not None:
            z_BNZ = z_BNZ + self.start(start_features(x0_BCT, config).flatten(2))
        return z_BNZ.transpose(1, 2)

    def _pooled(self, h_BTW: Tensor) -> Tensor:
        tokens = self.config.tokens_per_z
        if self.config.pool == "average":
            return self.project_out(h_BTW).unflatten(1, (-1, tokens)).mean(2)
        # Divided by the number of places, so that one step of the optimizer changes z as much as with the average.
        return self.project_out(self.narrow(h_BTW).unflatten(1, (-1, tokens)).flatten(2) / tokens)


class Upsampler(nn.Module):
    """f: z (B, Z, N) → condition (B, dit width, tokens of the DiT).

    f spreads each z over its tokens, refines them by Transformer blocks, and projects them to D's width. With
    `pool=places`, each place of a z has weights of its own; with `average`, all places get the same vector. The last
    layer is initialised to zero, so that an untrained f leaves a pretrained D's output unchanged.
    """

    def __init__(self, config: LatentEncoderConfig, *, dit_width: int, dit_patch_size: int) -> None:
        super().__init__()
        self.config = config
        self.dit_patch_size = dit_patch_size
        if config.pool == "places":
            self.spread = nn.Linear(config.z_channels, config.tokens_per_z * config.place_width)
            self.project_in = nn.Linear(config.place_width, config.width)
        else:
            self.project_in = nn.Linear(config.z_channels, config.width)
        # A learned embedding of a token's position within its z; the repeated tokens would otherwise be identical.
        self.place = nn.Parameter(torch.randn(config.tokens_per_z, config.width) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(config.width, config.heads) for _ in range(config.upsampler_depth))
        self.norm = nn.LayerNorm(config.width)
        self.project_out = nn.Linear(config.width, dit_width)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)

    @torch.no_grad()
    def start_from(self, start: BlockPCA) -> None:
        """Initialise what f gives each place: a random projection of the features there that z stands for.

        Does nothing with `average`, where no weights belong to a place.
        """
        if self.config.pool == "average":
            return
        features_ZTF = start.features_of_channels().unflatten(1, (self.config.tokens_per_z, -1))
        features, width = features_ZTF.shape[2], self.config.place_width
        projection_FW = torch.empty(features, width)
        gain = max(1.0, features / width) ** 0.5  # so that the numbers of a place vary as much as the features do
        nn.init.orthogonal_(projection_FW, gain, generator=torch.Generator().manual_seed(0))
        self.spread.weight.copy_((features_ZTF @ projection_FW.to(features_ZTF.device)).flatten(1).T)
        self.spread.bias.zero_()

    def forward(self, z_BZN: Tensor) -> Tensor:
        """Upsample z to one condition vector per token of the DiT, for N · pooling frames."""
        h_BTW = (self._spread(z_BZN.transpose(1, 2)) + self.place).flatten(1, 2)
        rotary = _rotary(self.config, h_BTW)
        for block in self.blocks:
            h_BTW = block(h_BTW, rotary)
        return self._to_dit_tokens(self.project_out(layer_normed(h_BTW, self.norm)[1]).transpose(1, 2))

    def _spread(self, z_BNZ: Tensor) -> Tensor:
        """Return the vectors of each place of each z, (B, N, places, width); one for all places with `average`."""
        if self.config.pool == "average":
            return self.project_in(z_BNZ)[:, :, None]
        return self.project_in(self.spread(z_BNZ).unflatten(-1, (self.config.tokens_per_z, -1)))

    def _to_dit_tokens(self, condition_BWT: Tensor) -> Tensor:
        """Resample from tokens of `patch_size` frames to tokens of `dit_patch_size` frames."""
        if self.dit_patch_size == self.config.patch_size:
            return condition_BWT
        frames = condition_BWT.repeat_interleave(self.config.patch_size, dim=-1)
        return F.avg_pool1d(frames, self.dit_patch_size)


def start_features(x0_BCT: Tensor, config: LatentEncoderConfig) -> Tensor:
    """Return the features that the PCA sees: x0, its signed channels as magnitudes, by z vector: (B, N, pooling, C)."""
    signed_BCT, others_BCT = x0_BCT.split([config.signed_channels, x0_BCT.shape[1] - config.signed_channels], dim=1)
    features_BCT = torch.cat([signed_BCT.abs() - MEAN_MAGNITUDE, others_BCT], dim=1)
    return features_BCT.transpose(1, 2).unflatten(1, (-1, config.pooling))


def _features(x0_BCT: Tensor, config: LatentEncoderConfig) -> Tensor:
    return torch.cat([x0_BCT, x0_BCT.abs() - MEAN_MAGNITUDE], dim=1) if config.magnitudes else x0_BCT


def _to_patches(x_BCT: Tensor, patch_size: int) -> Tensor:
    """Group neighbouring frames into patches: (B, C, T) → (B, T / patch, patch · C)."""
    return x_BCT.transpose(1, 2).unflatten(1, (-1, patch_size)).flatten(2)
