"""Finite scalar quantization (arXiv 2309.15505): each number of z rounded to one of a few levels, nothing fitted."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.quantizers.quantizer import Quantizer


class FSQ(Quantizer):
    """Each book stands for its own ``width / books`` dimensions, in as many levels each as its bits allow.

    Where bits do not divide evenly, the first dimensions of a book get one more. A number is squashed by the normal
    distribution's function, which fills the levels evenly where z is normal, rounded, and put back at its level's
    median. ``spread``, the deviation of each dimension, is learned, through the rounding (straight-through).

    It wastes what dimensions have in common, which a residual quantizer uses: for the same error it needs more bits.
    A book that is left out decodes to the mean of its dimensions.

    Raises:
        ValueError: a width that the books don't divide, besides what :class:`Quantizer` raises.
    """

    kind = "fsq"

    def __init__(self, width: int, books: int, size: int) -> None:
        super().__init__(width, books, size)
        if width % books:
            divisors = [n for n in range(1, width + 1) if width % n == 0]
            raise ValueError(f"fsq shares {width} dimensions among its books: take one of {divisors}, not {books}")
        bits, each = size.bit_length() - 1, width // books
        self.levels = [2 ** (bits // each + (dimension < bits % each)) for dimension in range(each)]
        self.spread = nn.Parameter(torch.ones(width))

    @torch.no_grad()
    def fit(self, vectors: Tensor, *, seed: int) -> None:
        """Take mean and deviation of each dimension of ``vectors`` (N, width); ``seed`` changes nothing."""
        self._set_statistics(vectors)
        deviation = self.standardise(vectors.to(self.mean.device)).std(dim=0, correction=0)
        self.spread.copy_(torch.where(deviation > 0, deviation, 1.0))

    def revive(self, vectors: Tensor, *, rounds: int = 8) -> int:
        """Its codewords stay where they are."""
        return 0

    @torch.no_grad()
    def encode(self, z: Tensor, *, books: int | None = None) -> Tensor:
        """Codes ``(..., books)`` of ``z`` (..., width): the first books of them, whose codes depend on no other."""
        books = self._checked_books(books)
        with torch.autocast(z.device.type, enabled=False):
            levels, weights = self._levels_and_weights()
            level = self._place(self.standardise(z)).mul(levels).floor().long().minimum(levels - 1)
        return (level[..., :books, :] * weights).sum(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """``z_q`` (..., width) of ``codes`` (..., m): all the books or the first m of them."""
        books = self._checked_books(codes.shape[-1])
        levels, weights = self._levels_and_weights()
        level = codes.unsqueeze(-1) // weights % levels
        normal = math.sqrt(2) * torch.erfinv(2 * (level + 0.5) / levels - 1)
        missing = normal.new_zeros(*codes.shape[:-1], self.books - books, len(levels))
        return self.restore(torch.cat([normal, missing], dim=-2).flatten(-2) * self.spread)

    def loss(self, z: Tensor) -> Tensor:
        """Training's loss ``(N,)`` of ``z`` (N, width): the squared error with all books, a mean over width."""
        return (self.standardise(self.decode(self.encode(z))) - self.standardise(z)).square().mean(-1)

    def _place(self, standardised: Tensor) -> Tensor:
        """Where a number lies in its distribution, from 0 to 1, by books: (..., books, width / books)."""
        return torch.special.ndtr(standardised / self.spread).unflatten(-1, (self.books, -1))

    def _levels_and_weights(self) -> tuple[Tensor, Tensor]:
        """Of each dimension of a book its levels, and what one of them counts in a code."""
        levels = torch.tensor(self.levels, device=self.spread.device)
        return levels, torch.cumprod(levels, 0) // levels
