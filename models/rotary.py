"""RoPE: encodes positions by rotating pairs of features (arXiv 2104.09864), with YaRN for longer sequences.

Shape suffixes: B batch, S tokens of a sequence, H heads, K features of a head, k pairs of features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Cosines and sines of the angles of a sequence's tokens, for all samples of a batch, all heads and all blocks."""

    cos_S1K: Tensor
    """The cosine of each feature's pair."""
    sin_S1K: Tensor
    """The sine of each feature's pair, negated for the first feature of the pair."""

    @classmethod
    def at(cls, positions_S: Tensor, frequencies_k: Tensor) -> Rotary:
        """Compute the angles of tokens at these positions."""
        angles_S1k = positions_S[:, None, None] * frequencies_k
        cos_S1k, sin_S1k = angles_S1k.cos(), angles_S1k.sin()
        return cls(_paired(cos_S1k, cos_S1k), _paired(-sin_S1k, sin_S1k))

    def split(self, tokens: Sequence[int]) -> list[Rotary]:
        """Return the angles of parts of the sequence, each with its number of tokens."""
        return [Rotary(*part) for part in zip(*(each.split(list(tokens)) for each in self), strict=True)]

    def turn(self, x_BSHK: Tensor) -> Tensor:
        """Rotate each pair of neighbouring features by its token's angle; return float32 in the input's shape.

        Queries and keys are turned together, as heads of one tensor: on a GPU, each operation is a kernel.
        """
        x_BSHK = x_BSHK.float()
        swapped_BSHK = x_BSHK.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return x_BSHK * self.cos_S1K + swapped_BSHK * self.sin_S1K


def _paired(first_S1k: Tensor, second_S1k: Tensor) -> Tensor:
    return torch.stack((first_S1k, second_S1k), -1).flatten(-2)


def rope_frequencies(head_width: int, *, base: float, turning: int, device: torch.device) -> Tensor:
    """Return the radians per token for each pair of a head's features; 0 beyond the first `turning` features."""
    feature = torch.arange(0, head_width, 2, dtype=torch.float32, device=device)
    return base ** (-feature / head_width) * (feature < turning)


def yarn(frequencies_k: Tensor, *, base: float, trained_tokens: int, factor: float) -> Tensor:
    """Stretch RoPE to longer sequences by YaRN (arXiv 2309.00071, section 3.2).

    Frequencies with less than one turn in `trained_tokens` are divided by `factor`, those with more than 32 turns are
    unchanged, and those in between are interpolated.
    """
    pairs = len(frequencies_k)
    turns_32, turns_1 = (pairs * math.log(trained_tokens / (2 * math.pi * turns), base) for turns in (32, 1))
    low, high = max(math.floor(turns_32), 0), min(math.ceil(turns_1), 2 * pairs - 1)
    slowed_k = (torch.arange(pairs, device=frequencies_k.device) - low) / max(high - low, 1e-3)
    return torch.lerp(frequencies_k, frequencies_k / factor, slowed_k.clamp(0, 1))
