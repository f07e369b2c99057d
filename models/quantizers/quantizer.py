"""z to codes and back: the quantizers, all nested, so that the first books of a code are a code of a lower rate."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_KINDS = {
    "qinco2": ("models.quantizers.qinco2", "QINCo2"),
    "residual": ("models.quantizers.residual", "ResidualQuantizer"),
    "fsq": ("models.quantizers.fsq", "FSQ"),
}
QUANTIZER_KINDS = tuple(_KINDS)
"""Names of the quantizers that there are."""


class Quantizer(nn.Module, ABC):
    """``books`` codes of ``log2 size`` bits for each vector of ``width`` numbers.

    Vectors are standardised first, by a mean per dimension and one standard deviation for all of them, which keeps the
    meaning of distances; codebooks live in those units, and ``loss`` counts in them. Codes are int64 in [0, size).

    Raises:
        ValueError: a size that is no power of two, or less than one book or dimension.
    """

    kind: ClassVar[str]
    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, books: int, size: int) -> None:
        super().__init__()
        if width < 1 or books < 1:
            raise ValueError(f"a quantizer needs width and books of at least 1, not width={width}, books={books}")
        if size < 2 or size & (size - 1):
            nearest = 2 ** max(1, round(math.log2(max(size, 2))))
            raise ValueError(f"quantizer size={size} must be a power of two: the nearest is {nearest}")
        self.width, self.books, self.size = width, books, size
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    @abstractmethod
    def fit(self, vectors: Tensor, *, seed: int) -> None:
        """Set the statistics and the codebooks from ``vectors`` (N, width), the same for the same seed."""

    @abstractmethod
    def encode(self, z: Tensor, *, books: int | None = None) -> Tensor:
        """Codes ``(..., books)`` of ``z`` (..., width), chosen for that number of books; None takes all of them."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """``z_q`` (..., width) of ``codes`` (..., m): all the books or the first m of them."""

    @abstractmethod
    def loss(self, z: Tensor) -> Tensor:
        """Training's loss ``(N,)`` of ``z`` (N, width).

        The squared error of every prefix of the codes, summed over prefixes, a mean over width in standardised units.
        Codes are found without gradient; what they stand for has it.
        """

    def forward(self, z: Tensor) -> Tensor:
        """`loss`, by the call that wrappers of modules know."""
        return self.loss(z)

    @torch.no_grad()
    def revive(self, vectors: Tensor, *, rounds: int = 8) -> int:
        """Move codewords that no code of ``vectors`` (N, width) has to where they are used; returns how many are left.

        Each goes beside the codeword of its book that is used most, halfway to what that one serves worst.
        """
        x_NW, dead = self.standardise(vectors), 0
        for round_ in range(rounds + 1):
            codes_NM = self.encode(vectors)
            used_MK = torch.stack([torch.bincount(codes_N, minlength=self.size) for codes_N in codes_NM.T])
            dead = int((used_MK == 0).sum())
            if dead == 0 or round_ == rounds:
                break
            for book in (used_MK == 0).any(dim=1).nonzero().flatten().tolist():
                left_NW = x_NW - self.standardise(self.decode(codes_NM[:, : book + 1]))
                unused = (used_MK[book] == 0).nonzero().flatten().tolist()
                for code, busy in zip(unused, used_MK[book].topk(len(unused)).indices.tolist(), strict=True):
                    served = left_NW[codes_NM[:, book] == busy]
                    if len(served):
                        self._split(book, code, busy, served[served.square().sum(dim=1).argmax()] / 2)
        return dead

    def _split(self, book: int, code: int, busy: int, step_W: Tensor) -> None:
        """Let a codeword be another one and a step."""
        raise NotImplementedError

    def bits(self, books: int | None = None) -> int:
        """Bits a vector, with the first ``books`` books or all of them."""
        return self._checked_books(books) * (self.size.bit_length() - 1)

    def config(self) -> dict[str, Any]:
        """What :func:`make_quantizer` builds this quantizer from, its weights aside."""
        return {"kind": self.kind, "width": self.width, "books": self.books, "size": self.size}

    def standardise(self, z: Tensor) -> Tensor:
        """``z`` (..., width) in the units of the codebooks."""
        return (z.float() - self.mean) / self.scale

    def restore(self, standardised: Tensor) -> Tensor:
        """The inverse of :meth:`standardise`."""
        return standardised * self.scale + self.mean

    def _checked_books(self, books: int | None) -> int:
        books = self.books if books is None else books
        if not 1 <= books <= self.books:
            raise ValueError(f"this quantizer has {self.books} books: it cannot use {books}")
        return books

    @torch.no_grad()
    def _set_statistics(self, vectors: Tensor) -> None:
        vectors = vectors.double()
        self.mean.copy_(vectors.mean(dim=0))
        spread = (vectors - vectors.mean(dim=0)).square().mean().sqrt()
        self.scale.copy_(spread if spread > 0 else torch.ones_like(spread))


def make_quantizer(config: dict[str, Any]) -> Quantizer:
    """The quantizer that ``config`` tells of: its ``kind``, and the arguments of that class.

    Raises:
        ValueError: an unknown kind, or arguments that it does not take.
    """
    arguments = dict(config)
    kind = arguments.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"unknown quantizer kind '{kind}': choose one of {', '.join(QUANTIZER_KINDS)}")
    module, name = _KINDS[kind]
    try:
        return getattr(importlib.import_module(module), name)(**arguments)
    except TypeError as error:
        raise ValueError(f"quantizer '{kind}': {error}") from error


def nearest(residuals_NBW: Tensor, codebook_KW: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` nearest pairs of a residual and a codeword, of each row: their indices (N, A) in B and in K."""
    # ‖r - c‖² = ‖r‖² - 2 r·c + ‖c‖²
    errors_NBK = residuals_NBW.square().sum(dim=-1, keepdim=True) + codebook_KW.square().sum(dim=-1)
    errors_NBK.sub_(F.linear(residuals_NBW, codebook_KW), alpha=2)
    candidates = errors_NBK.flatten(1)
    best = candidates.topk(min(count, candidates.shape[1]), dim=1, largest=False).indices
    return best // len(codebook_KW), best % len(codebook_KW)


def rows(table_NBX: Tensor, index_NA: Tensor) -> Tensor:
    """Of each table (B, X) the rows at ``index``: (N, A, X)."""
    return table_NBX.gather(1, index_NA.unsqueeze(-1).expand(-1, -1, table_NBX.shape[-1]))
