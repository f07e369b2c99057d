"""Residual quantization with plain codebooks: a baseline, and the initialisation of QINCo2."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.quantizers.quantizer import Progressed, Quantizer, SearchCost, nearest, rows

logger = logging.getLogger(__name__)

VECTORS_PER_CODEWORD = 40
"""With fewer training vectors than this per codeword of a book, the codebooks overfit the training vectors."""
_SEARCH_NUMBERS = 2**23
"""Numbers in the largest tensor of a search: 32 MiB in float32."""
_FIT_DISTANCES = 2**26
"""Distances that a step of fitting keeps in memory: 256 MiB."""
_POINTS_PER_CENTROID = 256
"""Training vectors per codeword; more than these do not improve k-means. This is faiss's own default."""


class ResidualQuantizer(Quantizer):
    """Each book quantizes the residual that the earlier books leave; a beam search over the books finds the codes.

    The search helps more than any other refinement: at 96 bits for 64 dimensions it reduces the error by a fifth.
    """

    kind = "residual"

    def __init__(self, width: int, books: int, size: int, *, beam: int = 32) -> None:
        super().__init__(width, books, size)
        if beam < 1:
            raise ValueError(f"a beam search needs a beam of at least 1, not {beam}")
        self.beam = beam
        self.codebooks = nn.Parameter(torch.zeros(books, size, width))

    def config(self) -> dict[str, Any]:
        """Return the config from which :func:`make_quantizer` builds this quantizer without its weights."""
        return super().config() | {"beam": self.beam}

    @torch.no_grad()
    def fit(
        self,
        vectors: Tensor,
        *,
        seed: int,
        progress: Progressed = None,
        fit_beam: int = 4,
        limit: int | None = None,
    ) -> None:
        """Train the codebooks with faiss, on one thread because the number of threads changes the result.

        Args:
            vectors: (N, width), on any device and in any dtype.
            seed: the seed of k-means and of the choice of vectors.
            progress: called with (codebooks fitted, all codebooks) after each.
            fit_beam: sequences of codes kept for each vector during training, which takes longer with more. A wide beam
                helps much less here than in :meth:`encode`: 4 is nearly as good as 32.
            limit: the maximum number of vectors to train on, drawn without replacement; None takes 256 per codeword of
                a book, as faiss's k-means uses no more.

        Raises:
            ValueError: ``vectors`` have another shape, are not finite, or are fewer than ``size`` after the limit.
        """
        limit = _POINTS_PER_CENTROID * self.size if limit is None else limit
        self._check_vectors(vectors, limit)
        self._set_statistics(vectors)
        if len(vectors) > limit:
            chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:limit]
            vectors = vectors[chosen.to(vectors.device)]
        points = self.standardise(vectors.to(self.mean.device)).cpu().numpy()
        codebooks = _faiss_codebooks(points, self.books, self.size, seed=seed, beam=fit_beam, progress=progress)
        self.codebooks.copy_(torch.from_numpy(codebooks))

    @torch.no_grad()
    def encode(self, z: Tensor, *, books: int | None = None) -> Tensor:
        """Return codes ``(..., books)`` of ``z`` (..., width), optimised for that number of books; None uses all."""
        codebooks = self.codebooks[: self._resolve_books(books)].float()
        flat = self.standardise(z).reshape(-1, self.width)
        with torch.autocast(z.device.type, enabled=False):  # half precision would find other codes
            parts = flat.split(self.vectors_at_once(len(codebooks)))
            codes = [_beam_search(part, codebooks, self.beam) for part in parts]
        return torch.cat(codes).reshape(*z.shape[:-1], len(codebooks))

    def vectors_at_once(self, books: int) -> int:
        """See :meth:`Quantizer.vectors_at_once`."""
        return max(1, _SEARCH_NUMBERS // (self.beam * (self.size + self.width)))

    def rate_search(self, books: int) -> Callable[[Tensor, SearchCost], Tensor]:
        """See :meth:`Quantizer.rate_search`."""
        codebooks = self.codebooks[: self._resolve_books(books)].float()
        return lambda x_NW, cost: _beam_search(x_NW, codebooks, self.beam, cost)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode ``codes`` (..., m) of the first m books to ``z_q`` (..., width)."""
        return self.restore(self._codewords(codes).sum(dim=-2))

    def loss(self, z: Tensor) -> Tensor:
        """Return the training loss ``(N,)`` of ``z`` (N, width); see :meth:`Quantizer.loss`."""
        prefixes_NMW = self._codewords(self.encode(z)).cumsum(dim=-2)
        error_NMW = prefixes_NMW - self.standardise(z).unsqueeze(-2)
        return error_NMW.square().mean(dim=-1).sum(dim=-1)

    def _split(self, book: int, code: int, busy: int, step_W: Tensor) -> None:
        self.codebooks[book, code] = self.codebooks[book, busy] + step_W

    def _codewords(self, codes: Tensor) -> Tensor:
        books = self._resolve_books(codes.shape[-1])
        return self.codebooks[torch.arange(books, device=codes.device), codes.long()]

    def _check_vectors(self, vectors: Tensor, limit: int) -> None:
        if vectors.dim() != 2 or vectors.shape[1] != self.width:
            raise ValueError(f"the quantizer is fitted on vectors (N, {self.width}), not {tuple(vectors.shape)}")
        count, wanted = min(len(vectors), limit), VECTORS_PER_CODEWORD * self.size
        if count < self.size:
            raise ValueError(f"{count} vectors cannot fill codebooks of {self.size}: add vectors or lower the size")
        if not torch.isfinite(vectors).all():
            raise ValueError("the vectors to fit a quantizer on are not all finite: check the run that produced them")
        if count < wanted:
            logger.warning(
                "%d vectors are few for codebooks of %d, which will overfit: use at least %d", count, self.size, wanted
            )


def _beam_search(x_NW: Tensor, codebooks_MKW: Tensor, beam: int, cost: SearchCost | None = None) -> Tensor:
    """Search the codes (N, M) of ``x``, keeping the ``beam`` sequences with the least error after each book."""
    residuals_NBW, codes_NBM = x_NW.unsqueeze(1), x_NW.new_zeros((len(x_NW), 1, 0), dtype=torch.int64)
    for book, codebook_KW in enumerate(codebooks_MKW):
        parent, code = nearest(residuals_NBW, codebook_KW, beam, cost.with_next(book) if cost else None)
        if cost:
            cost.keep(book, parent, code)
        residuals_NBW = rows(residuals_NBW, parent) - codebook_KW[code]
        codes_NBM = torch.cat([rows(codes_NBM, parent), code.unsqueeze(-1)], dim=-1)
    return codes_NBM[:, 0]


def _faiss_codebooks(
    points_NW: np.ndarray, books: int, size: int, *, seed: int, beam: int, progress: Progressed
) -> np.ndarray:
    """Fit codebooks (books, size, width) to `points_NW` by residual k-means with a beam.

    The steps are those of `faiss.ResidualQuantizer.train`, one codebook at a time, with the same result to the bit:
    faiss itself reports no progress.
    """
    import faiss  # imported here because only `fit` needs it

    width = points_NW.shape[1]
    whole = faiss.ResidualQuantizer(width, books, size.bit_length() - 1)  # its `cp` are the settings of k-means
    whole.cp.seed = seed % 2**31
    whole.cp.max_points_per_centroid = _POINTS_PER_CENTROID
    whole.cp.min_points_per_centroid = 1  # `_check_vectors` has already warned
    residuals_NBW = np.ascontiguousarray(points_NW, dtype=np.float32)[:, None]
    codes_NBM, codebooks = np.zeros((len(points_NW), 1, 0), np.int32), []
    with _one_thread():
        for book in range(books):
            clustering = faiss.Clustering(width, size, whole.cp)
            clustering.train(residuals_NBW.reshape(-1, width), faiss.IndexFlatL2(width))
            codebooks.append(faiss.vector_to_array(clustering.centroids).reshape(size, width))
            if progress is not None:
                progress(book + 1, books)
            if book + 1 < books:
                codes_NBM, residuals_NBW = _faiss_step(residuals_NBW, codes_NBM, codebooks[-1], beam)
    return np.stack(codebooks)


def _faiss_step(
    residuals_NBW: np.ndarray, codes_NBM: np.ndarray, codebook_KW: np.ndarray, beam: int
) -> tuple[np.ndarray, np.ndarray]:
    """Go on with a beam search by one codebook; return the codes and what they leave of the vectors."""
    import faiss

    (count, before, width), size, books = residuals_NBW.shape, len(codebook_KW), codes_NBM.shape[2]
    kept = min(before * size, beam)
    codes = np.empty((count, kept, books + 1), np.int32)
    residuals, errors = np.empty((count, kept, width), np.float32), np.empty((count, kept), np.float32)
    at_once = max(1, _FIT_DISTANCES // (before * size))
    for first in range(0, count, at_once):
        part = slice(first, min(count, first + at_once))
        faiss.beam_search_encode_step(  # type: ignore[attr-defined]  # the stubs lack it
            *(width, size, faiss.swig_ptr(codebook_KW), part.stop - first),
            *(before, faiss.swig_ptr(residuals_NBW[part]), books, _pointer(codes_NBM[part])),
            *(kept, faiss.swig_ptr(codes[part]), faiss.swig_ptr(residuals[part]), faiss.swig_ptr(errors[part])),
            faiss.IndexFlatL2(width),
        )
    return codes, residuals


def _pointer(codes: np.ndarray) -> Any:
    """Return the codes as faiss takes them; for an empty array, which has no address, any other address."""
    import faiss

    return faiss.swig_ptr(codes if codes.size else np.zeros(1, np.int32))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let faiss use one thread: with several, the order of summation varies, and a forked process would hang."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)  # torch may share this OpenMP runtime
