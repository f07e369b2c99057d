"""The interface of the quantizers between z and codes. All are nested: the first books alone are a lower-rate code."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_KINDS = {
    "qinco2": ("models.quantizers.qinco2", "QINCo2"),
    "residual": ("models.quantizers.residual", "ResidualQuantizer"),
    "fsq": ("models.quantizers.fsq", "FSQ"),
}
QUANTIZER_KINDS = tuple(_KINDS)
"""Names of the available quantizers."""

Progressed = Callable[[int, int], None] | None
"""Called with (done, total) after each step of long work; None: nobody asks."""


class SearchCost(Protocol):
    """What the sequences of codes in a beam cost in addition to their error; asked book by book."""

    def with_next(self, book: int) -> Tensor:
        """Return the cost (N, B, K) of each sequence with each codeword of the next book."""

    def keep(self, book: int, parent_NB: Tensor, code_NB: Tensor) -> None:
        """Go on with the sequences that continue ``parent_NB`` by ``code_NB``."""


class Quantizer(nn.Module, ABC):
    """Codes each vector of ``width`` numbers by ``books`` codes of ``log2 size`` bits.

    Vectors are standardised first, with a mean per dimension and one standard deviation for all dimensions, which
    preserves the ratios of distances. Codebooks and ``loss`` are in these units. Codes are int64 in [0, size).

    Raises:
        ValueError: ``size`` is not a power of two, or ``books`` or ``width`` is less than 1.
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
    def fit(self, vectors: Tensor, *, seed: int, progress: Progressed = None) -> None:
        """Fit the statistics and the codebooks to ``vectors`` (N, width); the same seed gives the same result.

        ``progress`` is called with (codebooks fitted, all codebooks) after each.
        """

    @abstractmethod
    def encode(self, z: Tensor, *, books: int | None = None) -> Tensor:
        """Return codes ``(..., books)`` of ``z`` (..., width), optimised for that number of books; None uses all."""

    def vectors_at_once(self, books: int) -> int:
        """Return how many vectors `encode` searches together; the codes of more don't depend on cuts at multiples."""
        return 1

    def rate_search(self, books: int) -> Callable[[Tensor, SearchCost], Tensor]:
        """Return a search by error plus cost: from standardised vectors (N, width) to codes (N, ``books``).

        The error is squared and summed over the width. Raises ValueError if the quantizer searches nothing.
        """
        raise ValueError(
            f"quantizer.kind={self.kind} can't weigh error against bits, only residual and qinco2 can: leave the error "
            "per bit at 0"
        )

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Decode ``codes`` (..., m) of the first m books to ``z_q`` (..., width)."""

    @abstractmethod
    def loss(self, z: Tensor) -> Tensor:
        """Return the training loss ``(N,)`` of ``z`` (N, width).

        It is the squared error in standardised units, averaged over the width and summed over all prefixes of the
        codes. The codes are found without gradient; the gradient flows through their decoding.
        """

    def forward(self, z: Tensor) -> Tensor:
        """Return `loss`, because wrappers of modules, such as DDP, only hook into `forward`."""
        return self.loss(z)

    @torch.no_grad()
    def revive(self, vectors: Tensor, *, rounds: int = 8, progress: Progressed = None) -> int:
        """Move codewords that no code of ``vectors`` (N, width) uses; return how many are still unused at the end.

        A book's unused codewords are paired with its most used ones. Each is moved next to its partner, halfway towards
        the vector that the partner approximates worst. ``progress`` is called with (searches of all codes done, at
        most so many) after each search.
        """
        x_NW, dead = self.standardise(vectors), 0
        for round_ in range(rounds + 1):
            codes_NM = self.encode(vectors)
            used_MK = torch.stack([torch.bincount(codes_N, minlength=self.size) for codes_N in codes_NM.T])
            dead = int((used_MK == 0).sum())
            if progress is not None:
                progress(round_ + 1, rounds + 1)
            if dead == 0 or round_ == rounds:
                break
            for book in (used_MK == 0).any(dim=1).nonzero().flatten().tolist():
                errors_NW = x_NW - self.standardise(self.decode(codes_NM[:, : book + 1]))
                unused = (used_MK[book] == 0).nonzero().flatten().tolist()
                for code, busy in zip(unused, used_MK[book].topk(len(unused)).indices.tolist(), strict=True):
                    own_errors = errors_NW[codes_NM[:, book] == busy]
                    if len(own_errors):
                        self._split(book, code, busy, own_errors[own_errors.square().sum(dim=1).argmax()] / 2)
        return dead

    def _split(self, book: int, code: int, busy: int, step_W: Tensor) -> None:
        """Set codeword ``code`` of ``book`` to codeword ``busy`` plus ``step_W``."""
        raise NotImplementedError

    def bits(self, books: int | None = None) -> int:
        """Return the bits per vector with the first ``books`` books; None counts all books."""
        return self._resolve_books(books) * (self.size.bit_length() - 1)

    def config(self) -> dict[str, Any]:
        """Return the config from which :func:`make_quantizer` builds this quantizer without its weights."""
        return {"kind": self.kind, "width": self.width, "books": self.books, "size": self.size}

    def standardise(self, z: Tensor) -> Tensor:
        """Convert ``z`` (..., width) to the standardised units of the codebooks."""
        return (z.float() - self.mean) / self.scale

    def restore(self, standardised: Tensor) -> Tensor:
        """Convert standardised units back to those of ``z``; the inverse of :meth:`standardise`."""
        return standardised * self.scale + self.mean

    def _resolve_books(self, books: int | None) -> int:
        books = self.books if books is None else books
        if not 1 <= books <= self.books:
            raise ValueError(
                f"this quantizer has {self.books} books: give a number from 1 to {self.books}, not {books}"
            )
        return books

    @torch.no_grad()
    def _set_statistics(self, vectors: Tensor) -> None:
        vectors = vectors.double()
        self.mean.copy_(vectors.mean(dim=0))
        spread = (vectors - vectors.mean(dim=0)).square().mean().sqrt()
        self.scale.copy_(spread if spread > 0 else torch.ones_like(spread))


def make_quantizer(config: dict[str, Any]) -> Quantizer:
    """Build a quantizer from ``config``, which holds its ``kind`` and the arguments of its class.

    Raises:
        ValueError: the kind is unknown, or its class does not take the arguments.
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


def nearest(
    residuals_NBW: Tensor, codebook_KW: Tensor, count: int, cost_NBK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find each row's ``count`` nearest (residual, codeword) pairs; return their indices (N, A) in B and in K.

    A cost is added to the squared distances.
    """
    # ‖r - c‖² = ‖r‖² - 2 r·c + ‖c‖²
    errors_NBK = residuals_NBW.square().sum(dim=-1, keepdim=True) + codebook_KW.square().sum(dim=-1)
    errors_NBK.sub_(F.linear(residuals_NBW, codebook_KW), alpha=2)
    if cost_NBK is not None:
        errors_NBK += cost_NBK
    candidates = errors_NBK.flatten(1)
    best = candidates.topk(min(count, candidates.shape[1]), dim=1, largest=False).indices
    return best // len(codebook_KW), best % len(codebook_KW)


def rows(table_NBX: Tensor, index_NA: Tensor) -> Tensor:
    """Gather the rows ``index_NA`` of each table (B, X) in ``table_NBX``: (N, A, X)."""
    return table_NBX.gather(1, index_NA.unsqueeze(-1).expand(-1, -1, table_NBX.shape[-1]))
