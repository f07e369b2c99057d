"""QINCo2: residual quantization whose codebooks are computed from what is decoded so far (arXiv 2501.03078).

Shape suffixes: N vectors, M books, K codewords of a book, W width of a vector, E width inside the networks, B sequences
of codes kept by the search, A candidates that it looks at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.quantizers.quantizer import Quantizer, nearest, rows
from models.quantizers.residual import ResidualQuantizer

_SEARCH_NUMBERS = 2**23
"""Numbers in the largest tensor of a search: 32 MiB in float32."""


class ImplicitCodebook(nn.Module):
    """f(c, x̂) = c + out(MLPs(in(c) + [in(c); x̂]·W)): a codeword c, adapted to what the books before it decode to.

    Its last layer starts at zero, so that at first it is c itself, and the whole is the residual quantizer that its
    codewords were fitted as.
    """

    def __init__(self, width: int, embedding: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.inward = nn.Linear(width, embedding, bias=False)
        # the linear layer on the concatenation, in two parts: that of the codewords is one table for all vectors
        self.of_codeword = nn.Linear(embedding, embedding, bias=False)
        self.of_estimate = nn.Linear(width, embedding)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(embedding, hidden), nn.ReLU(), nn.Linear(hidden, embedding)) for _ in range(depth)
        )
        self.outward = nn.Linear(embedding, width, bias=False)
        nn.init.zeros_(self.outward.weight)

    def embedded(self, codewords: Tensor) -> Tensor:
        """All that does not depend on the estimate: (..., W) → (..., E)."""
        embedded = self.inward(codewords)
        return embedded + self.of_codeword(embedded)

    def forward(self, codewords: Tensor, embedded: Tensor, given: Tensor) -> Tensor:
        """What codewords (..., W) stand for, (..., W).

        Args:
            codewords: c.
            embedded: `embedded(c)`, (..., E).
            given: `of_estimate(x̂)` of what was decoded before, (..., E).
        """
        h = embedded + given
        for block in self.blocks:
            h = h + block(h)
        return codewords + self.outward(h)


class QINCo2(Quantizer):
    """Book after book, each computed by a network from the decoded sum of the ones before (arXiv 2501.03078).

    The search keeps `beam` sequences of codes. At each book a second, plain codebook orders all their continuations
    (pre-selection, section 3.2), and the networks are asked about the best `candidates` alone. Unlike in the paper,
    these are the best of all sequences together, not as many of each: a good sequence gets more of them, and a search
    of the same error costs a fraction.

    Starts as a residual k-means. Any prefix of the codes decodes.
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
            raise ValueError(f"a search that keeps {beam} sequences needs as many candidates, not {candidates}")
        self.beam, self.candidates = beam, candidates
        self.depth, self.embedding, self.hidden = depth, embedding, hidden
        self.codebooks = nn.Parameter(torch.zeros(books, size, width))
        self.preselection = nn.Parameter(torch.zeros(books - 1, size, width))
        self.steps = nn.ModuleList(ImplicitCodebook(width, embedding, hidden, depth) for _ in range(books - 1))

    def config(self) -> dict[str, Any]:
        """What :func:`make_quantizer` builds this quantizer from, its weights aside."""
        own = ("beam", "candidates", "depth", "embedding", "hidden")
        return super().config() | {name: getattr(self, name) for name in own}

    @torch.no_grad()
    def fit(self, vectors: Tensor, *, seed: int) -> None:
        """Start as the residual k-means of ``vectors`` (N, width); the rest is learned by gradient, from `loss`.

        Raises:
            ValueError: vectors of another shape, not finite, or fewer than ``size``.
        """
        start = ResidualQuantizer(self.width, self.books, self.size).to(self.mean.device)
        start.fit(vectors, seed=seed)
        self.mean.copy_(start.mean)
        self.scale.copy_(start.scale)
        self.codebooks.copy_(start.codebooks)
        self.preselection.copy_(start.codebooks[1:])

    @torch.no_grad()
    def encode(self, z: Tensor, *, books: int | None = None) -> Tensor:
        """Codes ``(..., books)`` of ``z`` (..., width), chosen for that number of books; None takes all of them."""
        books = self._checked_books(books)
        flat = self.standardise(z).reshape(-1, self.width)
        numbers = max(self.beam * (self.size + self.width), self.candidates * (self.hidden + 2 * self.embedding))
        with torch.autocast(z.device.type, enabled=False):  # half precision would choose other codes
            tables = [step.embedded(self.codebooks[book]) for book, step in self._networks(books)]
            codes = [self._search(part, tables) for part in flat.split(max(1, _SEARCH_NUMBERS // numbers))]
        return torch.cat(codes).reshape(*z.shape[:-1], books)

    def decode(self, codes: Tensor) -> Tensor:
        """``z_q`` (..., width) of ``codes`` (..., m): all the books or the first m of them."""
        *_, estimate = self._estimates(codes)
        return self.restore(estimate)

    def loss(self, z: Tensor) -> Tensor:
        """Training's loss ``(N,)`` of ``z`` (N, width): see :meth:`Quantizer.loss`, and as much of the pre-selection.

        The latter is the error of each book's own plain codeword in place of the computed one.
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
        """What each prefix of ``codes`` (..., m) decodes to, (..., W), in the units of the codebooks."""
        books = self._checked_books(codes.shape[-1])
        estimates = [F.embedding(codes[..., 0], self.codebooks[0])]
        for book, step in self._networks(books):
            codewords = F.embedding(codes[..., book], self.codebooks[book])
            given = step.of_estimate(estimates[-1])
            estimates.append(estimates[-1] + step(codewords, step.embedded(codewords), given))
        return estimates

    def _networks(self, books: int) -> Iterator[tuple[int, ImplicitCodebook]]:
        """The books but the first, of the first so many, each with its network."""
        return enumerate(islice(cast("Iterable[ImplicitCodebook]", self.steps), books - 1), 1)

    def _search(self, x_NW: Tensor, tables: list[Tensor]) -> Tensor:
        """Codes (N, books) of ``x``; ``tables`` has what each step but the first embeds its codewords to."""
        last = len(tables)
        parent_NB, codes_NBM = nearest(x_NW.unsqueeze(1), self.codebooks[0], self.beam if last else 1)
        estimates_NBW, codes_NBM = self.codebooks[0][codes_NBM], codes_NBM.unsqueeze(-1)
        for (book, step), table_KE in zip(self._networks(last + 1), tables, strict=True):
            residuals_NBW = x_NW.unsqueeze(1) - estimates_NBW
            parent_NA, code_NA = nearest(residuals_NBW, self.preselection[book - 1], self.candidates)
            given_NAE = rows(step.of_estimate(estimates_NBW), parent_NA)
            ahead_NAW = rows(estimates_NBW, parent_NA)
            ahead_NAW = ahead_NAW + step(self.codebooks[book][code_NA], table_KE[code_NA], given_NAE)
            errors_NA = (ahead_NAW - x_NW.unsqueeze(1)).square().sum(-1)
            beam = min(self.beam if book < last else 1, errors_NA.shape[1])
            best_NB = errors_NA.topk(beam, dim=1, largest=False).indices
            estimates_NBW = rows(ahead_NAW, best_NB)
            parent_NB, code_NB = parent_NA.gather(1, best_NB), code_NA.gather(1, best_NB)
            codes_NBM = torch.cat([rows(codes_NBM, parent_NB), code_NB.unsqueeze(-1)], dim=-1)
        return codes_NBM[:, 0]
