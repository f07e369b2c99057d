"""Rate–distortion search: takes cheaper codes where the error that they add is worth the bits that they save.

Shape suffixes: R rows of codes, N vectors of a row, B sequences of codes in the beam, M books, K codewords of a book,
W features of the prior's embedding, Z channels of z.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.prior import Prior
from models.quantizers.quantizer import Quantizer, rows


class RateSearch:
    """Encodes the vectors of several rows in their order, by ‖z − z_q‖² + λ · bits instead of the error alone.

    The bits of a code depend on the previous vector's codes, so that vectors are searched one after another. Each
    search counts the bits of its own vector, and not what its codes cost the next one.
    """

    def __init__(self, quantizer: Quantizer, prior: Prior, *, error_per_bit: float, books: int | None = None) -> None:
        """Prepare the search.

        Args:
            quantizer: what finds the codes.
            prior: says how many bits they take.
            error_per_bit: λ: error that a vector may add for each bit that it saves, in thousandths of the variance of
                z.
            books: number of codebooks to use; None uses all.

        Raises:
            ValueError: `error_per_bit` is negative or not finite, or the quantizer searches nothing.
        """
        if not (math.isfinite(error_per_bit) and error_per_bit >= 0):
            raise ValueError(f"the error per bit must be a number of at least 0, not {error_per_bit}")
        self._quantizer, self._prior = quantizer, prior
        self._search = quantizer.rate_search(quantizer.books if books is None else books)
        # errors are squared and summed over z's channels, whose variance is 1 on average
        self._weight = error_per_bit / 1000 * quantizer.width
        self._before_RW: Tensor | None = None

    @torch.no_grad()
    def encode(self, z_RNZ: Tensor) -> Tensor:
        """Return the codes (R, N, M) of the next vectors of each row; the rows go on from call to call."""
        x_RNZ = self._quantizer.standardise(z_RNZ)
        before_RW = self._prior.start.expand(len(x_RNZ), -1) if self._before_RW is None else self._before_RW
        codes_RNM = []
        with torch.autocast(z_RNZ.device.type, enabled=False):  # half precision would find other codes
            for x_RZ in x_RNZ.unbind(1):
                codes_RNM.append(self._search(x_RZ, _Bits(self._prior, before_RW, self._weight)))
                before_RW = self._prior.embedded(codes_RNM[-1])
        self._before_RW = before_RW
        return torch.stack(codes_RNM, dim=1)


class _Bits:
    """The weighted bits of the sequences in the beam of one vector's search; see `models.quantizers.SearchCost`."""

    def __init__(self, prior: Prior, before_RW: Tensor, weight: float) -> None:
        self._prior, self._before_RW, self._weight = prior, before_RW, weight
        self._earlier_RBW = torch.zeros_like(before_RW).unsqueeze(1)
        self._so_far_RBK = before_RW.new_zeros(len(before_RW), 1, 1)

    def with_next(self, book: int) -> Tensor:
        """Return the cost (R, B, K) of each sequence with each codeword of the next book."""
        bits_RBK = self._prior.bits_of_next(book, self._earlier_RBW, self._before_RW)
        self._next_RBK = self._so_far_RBK + self._weight * bits_RBK
        return self._next_RBK

    def keep(self, book: int, parent_RB: Tensor, code_RB: Tensor) -> None:
        """Go on with the sequences that continue `parent_RB` by `code_RB`."""
        self._so_far_RBK = rows(self._next_RBK, parent_RB).gather(2, code_RB.unsqueeze(-1))
        self._earlier_RBW = rows(self._earlier_RBW, parent_RB) + self._prior.same[book][code_RB]
