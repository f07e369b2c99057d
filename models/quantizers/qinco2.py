"""QINCo2: residual quantization whose codebooks depend on what the earlier books decode to (arXiv 2501.03078).

Shape suffixes: N vectors, M books, K codewords of a book, W width of a vector, E width inside the networks, B sequences
of codes in the beam, A candidates that the search evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.quantizers.quantizer import Progressed, Quantizer, SearchCost, nearest, rows
from models.quantizers.residual import ResidualQuantizer

_SEARCH_NUMBERS = 2**23
"""Numbers in the largest tensor of a search: 32 MiB in float32."""


class ImplicitCodebook(nn.Module):
    """f(c, x̂) = c + out(MLPs(in(c) + [in(c); x̂]·W)): adapts a codeword c to x̂, the decoded sum of the earlier books.

    The last layer is initialised to zero, so that f(c, x̂) = c at first and training starts from the residual quantizer
    that the codewords were fitted for.
    """

    def __init__(self, width: int, embedding: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.inward = nn.Linear(width, embedding, bias=False)
        # W is split in two, because the codewords' part can be computed once for all vectors
        self.of_codeword = nn.Linear(embedding, embedding, bias=False)
        self.of_estimate = nn.Linear(width, embedding)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(embedding, hidden), nn.ReLU(), nn.Linear(hidden, embedding)) for _ in range(depth)
        )
        self.outward = nn.Linear(embedding, width, bias=False)
        nn.init.zeros_(self.outward.weight)

    def embedded(self, codewords: Tensor) -> Tensor:
        """Compute the part of the network that does not depend on the estimate x̂: (..., W) → (..., E)."""
        embedded = self.inward(codewords)
        return embedded + self.of_codeword(embedded)

    def forward(self, codewords: Tensor, embedded: Tensor, given: Tensor) -> Tensor:
        """Return the adapted codewords f(c, x̂), (..., W).

        Args:
            codewords: c, (..., W).
            embedded: `embedded(c)`, (..., E).
            given: `of_estimate(x̂)`, (..., E).
        """
        h = embedded + given
        for block in self.blocks:
            h = h + block(h)
        return codewords + self.outward(h)


class QINCo2(Quantizer):
    """A network computes each book's codewords from the decoded sum of the earlier books (arXiv 2501.03078).

    The search keeps a beam of `beam` sequences of codes. At each book, a second, plain codebook ranks all continuations
    (pre-selection, section 3.2), and the network only evaluates the best `candidates`. Unlike in the paper, these are
    the best over all sequences instead of an equal number for each sequence: good sequences get more candidates, which
    makes a search with the same error several times cheaper.

    Training starts from a residual k-means. Any prefix of the codes can be decoded.
    """

    kind = "qinco2"

    def __init__(
        self,
        width: int,
        books: int,
        size: int,
        *,
        beam: int = 16,
        candidates: int = 32,
        depth: int = 2,
        embedding: int = 128,
        hidden: int = 256,
    ) -> None:
        super().__init__(width, books, size)
        for name, value in (("beam", beam), ("candidates", candidates), ("embedding", embedding), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"a qinco2 quantizer needs {name} of at least 1, not {value}")
        if candidates < beam:
            raise ValueError(f"a beam of {beam} sequences needs at least {beam} candidates, not {candidates}")
        self.beam, self.candidates = beam, candidates
        self.depth, self.embedding, self.hidden = depth, embedding, hidden
        self.codebooks = nn.Parameter(torch.zeros(books, size, width))
        self.preselection = nn.Parameter(torch.zeros(books - 1, size, width))
        self.steps = nn.ModuleList(ImplicitCodebook(width, embedding, hidden, depth) for _ in range(books - 1))

    def config(self) -> dict[str, Any]:
        """Return the config from which :func:`make_quantizer` builds this quantizer without its weights."""
        own = ("beam", "candidates", "depth", "embedding", "hidden")
        return super().config() | {name: getattr(self, name) for name in own}

    @torch.no_grad()
    def fit(self, vectors: Tensor, *, seed: int, progress: Progressed = None) -> None:
        """Initialise the codebooks by residual k-means on ``vectors`` (N, width); the networks learn from `loss`.

        Raises:
            ValueError: ``vectors`` have another shape, are not finite, or are fewer than ``size``.
        """
        start = ResidualQuantizer(self.width, self.books, self.size).to(self.mean.device)
        start.fit(vectors, seed=seed, progress=progress)
        self.mean.copy_(start.mean)
        self.scale.copy_(start.scale)
        self.codebooks.copy_(start.codebooks)
        self.preselection.copy_(start.codebooks[1:])

    @torch.no_grad()
    def encode(self, z: Tensor, *, books: int | None = None) -> Tensor:
        """Return codes ``(..., books)`` of ``z`` (..., width), optimised for that number of books; None uses all."""
        books = self._resolve_books(books)
        flat = self.standardise(z).reshape(-1, self.width)
        with torch.autocast(z.device.type, enabled=False):  # half precision would find other codes
            tables = self._tables(books)
            codes = [self._search(part, tables) for part in flat.split(self.vectors_at_once(books))]
        return torch.cat(codes).reshape(*z.shape[:-1], books)

    def rate_search(self, books: int) -> Callable[[Tensor, SearchCost], Tensor]:
        """See :meth:`Quantizer.rate_search`."""
        with torch.no_grad():
            tables = self._tables(self._resolve_books(books))
        return lambda x_NW, cost: self._search(x_NW, tables, cost)

    def vectors_at_once(self, books: int) -> int:
        """See :meth:`Quantizer.vectors_at_once`."""
        numbers = max(self.beam * (self.size + self.width), self.candidates * (self.hidden + 2 * self.embedding))
        return max(1, _SEARCH_NUMBERS // numbers)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode ``codes`` (..., m) of the first m books to ``z_q`` (..., width)."""
        *_, estimate = self._estimates(codes)
        return self.restore(estimate)

    def loss(self, z: Tensor) -> Tensor:
        """Return the training loss ``(N,)`` of ``z`` (N, width): :meth:`Quantizer.loss` plus a pre-selection loss.

        The pre-selection loss of a book is the error if its plain codeword replaces the computed one.
        """
        x_NW, codes_NM = self.standardise(z), self.encode(z)
        total_N, before_NW = x_NW.new_zeros(len(x_NW)), torch.zeros_like(x_NW)
        for book, estimate_NW in enumerate(self._estimates(codes_NM)):
            if book:
                selected_NW = before_NW.detach() + F.embedding(codes_NM[:, book], self.preselection[book - 1])
                total_N = total_N + (selected_NW - x_NW).square().mean(-1)
            total_N = total_N + (estimate_NW - x_NW).square().mean(-1)
            before_NW = estimate_NW
        return total_N

    def _split(self, book: int, code: int, busy: int, step_W: Tensor) -> None:
        for codebook_KW in (self.codebooks[book], *([self.preselection[book - 1]] if book else [])):
            codebook_KW[code] = codebook_KW[busy] + step_W

    def _estimates(self, codes: Tensor) -> list[Tensor]:
        """Decode each prefix of ``codes`` (..., m) to a vector (..., W) in standardised units."""
        books = self._resolve_books(codes.shape[-1])
        codes = codes.long()
        estimates = [F.embedding(codes[..., 0], self.codebooks[0])]
        for book, step in self._networks(books):
            codewords = F.embedding(codes[..., book], self.codebooks[book])
            given = step.of_estimate(estimates[-1])
            estimates.append(estimates[-1] + step(codewords, step.embedded(codewords), given))
        return estimates

    def _networks(self, books: int) -> Iterator[tuple[int, ImplicitCodebook]]:
        """Yield (book, network) for the books 1 … ``books`` - 1; the first book has no network."""
        return enumerate(islice(cast("Iterable[ImplicitCodebook]", self.steps), books - 1), 1)

    def _tables(self, books: int) -> list[Tensor]:
        """Return each network's embedded codewords (K, E), which are the same for all vectors."""
        return [step.embedded(self.codebooks[book]) for book, step in self._networks(books)]

    def _search(self, x_NW: Tensor, tables: list[Tensor], cost: SearchCost | None = None) -> Tensor:
        """Search the codes (N, books) of ``x``; ``tables`` are those of :meth:`_tables`."""
        last = len(tables)
        cost_NBK = None if cost is None else cost.with_next(0)
        parent_NB, code_NB = nearest(x_NW.unsqueeze(1), self.codebooks[0], self.beam if last else 1, cost_NBK)
        if cost is not None:
            cost.keep(0, parent_NB, code_NB)
        estimates_NBW, codes_NBM = self.codebooks[0][code_NB], code_NB.unsqueeze(-1)
        for (book, step), table_KE in zip(self._networks(last + 1), tables, strict=True):
            residuals_NBW = x_NW.unsqueeze(1) - estimates_NBW
            cost_NBK = None if cost is None else cost.with_next(book)
            parent_NA, code_NA = nearest(residuals_NBW, self.preselection[book - 1], self.candidates, cost_NBK)
            given_NAE = rows(step.of_estimate(estimates_NBW), parent_NA)
            ahead_NAW = rows(estimates_NBW, parent_NA)
            ahead_NAW = ahead_NAW + step(self.codebooks[book][code_NA], table_KE[code_NA], given_NAE)
            errors_NA = (ahead_NAW - x_NW.unsqueeze(1)).square().sum(-1)
            if cost_NBK is not None:
                errors_NA += cost_NBK.flatten(1).gather(1, parent_NA * self.size + code_NA)
            beam = min(self.beam if book < last else 1, errors_NA.shape[1])
            best_NB = errors_NA.topk(beam, dim=1, largest=False).indices
            estimates_NBW = rows(ahead_NAW, best_NB)
            parent_NB, code_NB = parent_NA.gather(1, best_NB), code_NA.gather(1, best_NB)
            if cost is not None:
                cost.keep(book, parent_NB, code_NB)
            codes_NBM = torch.cat([rows(codes_NBM, parent_NB), code_NB.unsqueeze(-1)], dim=-1)
        return codes_NBM[:, 0]
