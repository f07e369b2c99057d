"""Bootstrap confidence intervals over the clips (Efron and Tibshirani 1993), vectorized over all replicates.

A replicate draws as many clips as there are, with replacement. All systems use the same draws, so that the difference
of two systems is paired, clip by clip.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEVEL = 0.95
REPLICATES = 2000
"""Number of replicates for means over clips."""
SET_REPLICATES = 200
"""Number of replicates for distances between sets, each of which takes the square roots of two covariances."""

Numbers = NDArray[np.float64]


@functools.cache
def counts(clips: int, replicates: int = REPLICATES) -> Numbers:
    """Draw how often each clip is in each replicate: (replicates, clips), the same in every process."""
    return np.random.default_rng(clips).multinomial(clips, np.full(clips, 1 / clips), size=replicates).astype(float)


def mean_replicates(values_C: Numbers) -> Numbers:
    """Return the mean of each replicate (R,) over the clips that have a value; NaN if no drawn clip has one."""
    has = np.isfinite(values_C)
    weights_RC = counts(len(values_C)) * has
    total_R = weights_RC.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return weights_RC @ np.where(has, values_C, 0.0) / total_R


def interval(replicates_R: Numbers) -> tuple[float, float] | None:
    """Return the percentile interval at `LEVEL`, or None if no replicate is finite."""
    finite = replicates_R[np.isfinite(replicates_R)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def excludes_zero(bounds: tuple[float, float] | None) -> bool:
    """Whether a difference is significant at 1 - `LEVEL`."""
    return bounds is not None and (bounds[0] > 0 or bounds[1] < 0)


class SetReplicates:
    """Computes replicates of the distances between the originals and sets of decodes of the same clips."""

    def __init__(self, reference: Sequence[Tensor], replicates: int = SET_REPLICATES) -> None:
        """Keep the embedding (windows, dim) of each original, and what all systems have in common."""
        self._clip = torch.repeat_interleave(torch.arange(len(reference)), torch.tensor([len(r) for r in reference]))
        self._a = torch.cat(list(reference)).double()
        self._clips, self._counts = len(reference), torch.from_numpy(counts(len(reference), replicates))
        self._bandwidth = torch.pdist(self._a).median().clamp(min=1e-12)
        self._within_a = self._blocks(self._a, self._a)
        self._roots: dict[int, Tensor] = {}

    def frechet(self, estimate: Sequence[Tensor], value: float) -> Numbers:
        """Return replicates (R,) of `figures.frechet_distance`; `value` is the distance over all clips.

        A replicate repeats clips and so has fewer distinct ones, which biases the distance upwards, as in a smaller
        set. The replicates are therefore shifted so that their mean is `value`; only their scatter is used.
        """
        b = torch.cat(list(estimate)).double()
        found = [self._frechet(number, b) for number in range(len(self._counts))]
        replicates = np.array(found)
        return np.maximum(replicates - replicates.mean() + value, 0.0)

    def kernel(self, estimate: Sequence[Tensor]) -> Numbers:
        """Return replicates (R,) of `figures.kernel_distance`, all with the bandwidth of the full set.

        The replicates are unbiased as well: copies of one clip are never paired with each other.
        """
        b = torch.cat(list(estimate)).double()
        within_a = self._mean_of_pairs(self._within_a, same=True)
        within_b = self._mean_of_pairs(self._blocks(b, b), same=True)
        return (within_a + within_b - 2 * self._mean_of_pairs(self._blocks(self._a, b), same=False)).numpy()

    def _frechet(self, number: int, b: Tensor) -> float:
        weights_N = self._counts[number][self._clip]
        drawn = weights_N > 0
        weights_N1 = weights_N[drawn, None]
        mean_a, a = _centred(self._a[drawn], weights_N1)
        mean_b, b = _centred(b[drawn], weights_N1)
        rows = weights_N1.sum() - 1
        if len(a) < a.shape[1]:  # A^½ B^½ has the same singular values as a bᵀ, which is smaller
            overlap = torch.linalg.svdvals(a @ b.T).sum() / rows
        else:
            if number not in self._roots:
                self._roots[number] = _root(a.T @ a / rows)
            overlap = torch.linalg.svdvals(self._roots[number] @ _root(b.T @ b / rows)).sum()
        spread = (a.square().sum() + b.square().sum()) / rows
        return float((mean_a - mean_b).square().sum() + spread - 2 * overlap)

    def _blocks(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum the kernel over the windows of each pair of clips: (C, C), without pairs of a window with itself."""
        kernel = (-0.5 * (torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / self._bandwidth) ** 2).exp()
        if x is y:
            kernel.fill_diagonal_(0.0)
        sums = torch.zeros(self._clips, len(y), dtype=x.dtype).index_add_(0, self._clip, kernel)
        return torch.zeros(self._clips, self._clips, dtype=x.dtype).index_add_(1, self._clip, sums)

    def _mean_of_pairs(self, sums_CC: Tensor, *, same: bool) -> Tensor:
        """Average sums (C, C) over the pairs of each replicate: (R,).

        A pair of different clips, drawn w and w' times, counts w·w' times; a clip paired with itself counts w times.
        """
        windows_C = torch.bincount(self._clip, minlength=self._clips).double()
        pairs_CC = torch.outer(windows_C, windows_C) - (windows_C.diag() if same else 0)

        def total(values_CC: Tensor) -> Tensor:
            own = values_CC.diag()
            across = values_CC - own.diag()
            w_RC = self._counts
            return ((w_RC @ across) * w_RC).sum(1) + w_RC @ own

        return total(sums_CC) / total(pairs_CC)


def _centred(rows_ND: Tensor, weights_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted mean, and centred rows (N, D) whose unweighted scatter matrix is the weighted one."""
    mean = (weights_N1 * rows_ND).sum(0) / weights_N1.sum()
    return mean, weights_N1.sqrt() * (rows_ND - mean)


def _root(covariance: Tensor) -> Tensor:
    variances, axes = torch.linalg.eigh(covariance)
    return (axes * variances.clamp(min=0).sqrt()) @ axes.T
