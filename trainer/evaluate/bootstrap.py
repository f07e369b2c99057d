"""Confidence intervals by resampling the clips (Efron and Tibshirani 1993), all replicates at once.

The clips are what is drawn at random: a replicate has as many of them, each zero or more times. All systems are
resampled alike, so that the difference of two of them is paired, clip by clip.
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
"""For means over clips."""
SET_REPLICATES = 200
"""For distances between sets: each takes the roots of two covariances."""

Numbers = NDArray[np.float64]


@functools.cache
def counts(clips: int, replicates: int = REPLICATES) -> Numbers:
    """How often each clip is in each replicate: (replicates, clips), the same in every process."""
    return np.random.default_rng(clips).multinomial(clips, np.full(clips, 1 / clips), size=replicates).astype(float)


def mean_replicates(values_C: Numbers) -> Numbers:
    """The mean of each replicate (R,), over the clips that have a value; NaN where none of it has."""
    has = np.isfinite(values_C)
    weights_RC = counts(len(values_C)) * has
    total_R = weights_RC.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return weights_RC @ np.where(has, values_C, 0.0) / total_R


def interval(replicates_R: Numbers) -> tuple[float, float] | None:
    """The percentile interval of `LEVEL`; None where nothing is finite."""
    finite = replicates_R[np.isfinite(replicates_R)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def excludes_zero(bounds: tuple[float, float] | None) -> bool:
    """Whether a difference is significant at 1 - `LEVEL`."""
    return bounds is not None and (bounds[0] > 0 or bounds[1] < 0)


class SetReplicates:
    """Replicates of the distances between the originals and other sets of decodes of the same clips."""

    def __init__(self, reference: Sequence[Tensor], replicates: int = SET_REPLICATES) -> None:
        """`reference`: rows (windows, dim) of each clip's embedding."""
        self._clip = torch.repeat_interleave(torch.arange(len(reference)), torch.tensor([len(r) for r in reference]))
        self._a = torch.cat(list(reference)).double()
        self._clips, self._counts = len(reference), torch.from_numpy(counts(len(reference), replicates))
        self._bandwidth = torch.pdist(self._a).median().clamp(min=1e-12)
        self._within_a = self._blocks(self._a, self._a)
        self._roots: dict[int, Tensor] = {}

    def frechet(self, estimate: Sequence[Tensor], value: float) -> Numbers:
        """Of `figures.frechet_distance`, (R,); `value` is that of all clips.

        A replicate holds clips more than once, so fewer different ones, which biases the distance upwards as a smaller
        set does. The replicates are shifted so that their mean is the value: what is kept is how they scatter.
        """
        b = torch.cat(list(estimate)).double()
        found = [self._frechet(number, b) for number in range(len(self._counts))]
        replicates = np.array(found)
        return np.maximum(replicates - replicates.mean() + value, 0.0)

    def kernel(self, estimate: Sequence[Tensor]) -> Numbers:
        """Of `figures.kernel_distance`, (R,); its bandwidth is held.

        Unbiased, too: copies of one clip are never paired with each other.
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
        if len(a) < a.shape[1]:  # the singular values of A^½ B^½ are those of the rows' own product
            overlap = torch.linalg.svdvals(a @ b.T).sum() / rows
        else:
            if number not in self._roots:
                self._roots[number] = _root(a.T @ a / rows)
            overlap = torch.linalg.svdvals(self._roots[number] @ _root(b.T @ b / rows)).sum()
        spread = (a.square().sum() + b.square().sum()) / rows
        return float((mean_a - mean_b).square().sum() + spread - 2 * overlap)

    def _blocks(self, x: Tensor, y: Tensor) -> Tensor:
        """Sums of the kernel over the windows of each pair of clips (C, C), without a window's with itself."""
        kernel = (-0.5 * (torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / self._bandwidth) ** 2).exp()
        if x is y:
            kernel.fill_diagonal_(0.0)
        sums = torch.zeros(self._clips, len(y), dtype=x.dtype).index_add_(0, self._clip, kernel)
        return torch.zeros(self._clips, self._clips, dtype=x.dtype).index_add_(1, self._clip, sums)

    def _mean_of_pairs(self, sums_CC: Tensor, *, same: bool) -> Tensor:
        """(R,): pairs of different clips count w·w', a clip's own once for each time that it was drawn."""
        windows_C = torch.bincount(self._clip, minlength=self._clips).double()
        pairs_CC = torch.outer(windows_C, windows_C) - (windows_C.diag() if same else 0)

        def total(values_CC: Tensor) -> Tensor:
            own = values_CC.diag()
            across = values_CC - own.diag()
            w_RC = self._counts
            return ((w_RC @ across) * w_RC).sum(1) + w_RC @ own

        return total(sums_CC) / total(pairs_CC)


def _centred(rows_ND: Tensor, weights_N1: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean, and rows whose plain second moment is the weighted scatter around it."""
    mean = (weights_N1 * rows_ND).sum(0) / weights_N1.sum()
    return mean, weights_N1.sqrt() * (rows_ND - mean)


def _root(covariance: Tensor) -> Tensor:
    variances, axes = torch.linalg.eigh(covariance)
    return (axes * variances.clamp(min=0).sqrt()) @ axes.T
