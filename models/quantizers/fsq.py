"""Finite scalar quantization (arXiv 2309.15505): each number of z is rounded to one of a few fixed levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.quantizers.quantizer import Progressed, Quantizer


class FSQ(Quantizer):
    """Each book codes ``width / books`` dimensions of its own and shares its bits evenly among them.

    If the bits do not divide evenly, the first dimensions of a book get one more. A number is mapped by the normal CDF,
    which fills the levels evenly if z is normal, is rounded to a level, and decodes to the median of that level.
    ``spread``, the standard deviation of each dimension, is fitted and then learned.

    FSQ cannot exploit the correlation between dimensions, so it needs more bits than a residual quantizer for the same
    error. A book that is left out decodes to the mean of its dimensions.

    Raises:
        ValueError: ``books`` does not divide ``width``, or :class:`Quantizer` raises it.
    """

    kind = "fsq"

    def __init__(self, width: int, books: int, size: int) -> None:
        super().__init__(width, books, size)
        if width % books:
            divisors = [n for n in range(1, width + 1) if width % n == 0]
            raise ValueError(f"fsq divides {width} dimensions among its books: take one of {divisors}, not {books}")
        self.bits_of_book, self.each = size.bit_length() - 1, width // books
        """The bits of a book's code, and the dimensions that share them."""
        self.spread = nn.Parameter(torch.ones(width))

    @torch.no_grad()
    def fit(self, vectors: Tensor, *, seed: int, progress: Progressed = None) -> None:
        """Set the mean and standard deviation of each dimension from ``vectors`` (N, width); ``seed`` has no effect."""
        self._set_statistics(vectors)
        deviation = self.standardise(vectors.to(self.mean.device)).std(dim=0, correction=0)
        self.spread.copy_(torch.where(deviation > 0, deviation, 1.0))

    def revive(self, vectors: Tensor, *, rounds: int = 8, progress: Progressed = None) -> int:
        """Do nothing and return 0, because the levels are fixed."""
        return 0

    @torch.no_grad()
    def encode(self, z: Tensor, *, books: int | None = None) -> Tensor:
        """Return the codes ``(..., books)`` of ``z`` (..., width); no book's code depends on another book."""
        books = self._resolve_books(books)
        with torch.autocast(z.device.type, enabled=False):
            levels, weights = self._levels_and_weights()
            level = self._quantile(self.standardise(z)).mul(levels).floor().long().minimum(levels - 1)
        return (level[..., :books, :] * weights).sum(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode ``codes`` (..., m) of the first m books to ``z_q`` (..., width)."""
        books = self._resolve_books(codes.shape[-1])
        levels, weights = self._levels_and_weights()
        level = codes.unsqueeze(-1) // weights % levels
        normal = math.sqrt(2) * torch.erfinv(2 * (level + 0.5) / levels - 1)
        missing = normal.new_zeros(*codes.shape[:-1], self.books - books, len(levels))
        return self.restore(torch.cat([normal, missing], dim=-2).flatten(-2) * self.spread)

    def loss(self, z: Tensor) -> Tensor:
        """Return the training loss ``(N,)`` of ``z`` (N, width): the mean squared error with all books."""
        return (self.standardise(self.decode(self.encode(z))) - self.standardise(z)).square().mean(-1)

    def _quantile(self, standardised: Tensor) -> Tensor:
        """Map standardised numbers by the normal CDF to (0, 1), grouped by book: (..., books, width / books)."""
        return torch.special.ndtr(standardised / self.spread).unflatten(-1, (self.books, -1))

    def _levels_and_weights(self) -> tuple[Tensor, Tensor]:
        """Return each dimension's number of levels in a book, and its place value in the book's code.

        They are computed on the device: the host would wait for a copy, and a CUDA graph cannot hold one.
        """
        dimension = torch.arange(self.each, device=self.spread.device)
        bits = self.bits_of_book // self.each + (dimension < self.bits_of_book % self.each).long()
        levels = torch.ones_like(bits) << bits
        return levels, torch.cumprod(levels, 0) // levels
