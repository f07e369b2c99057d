"""How many directions z uses, which says whether there is anything for a vector quantizer to gain."""

from __future__ import annotations

import torch
from torch import Tensor

SHARE = 0.99
"""Share of the variance that the counted directions hold."""
FEWEST = 0.25
"""With fewer directions than this fraction of z's channels, most of z carries nothing."""


def effective_rank(covariance_ZZ: Tensor) -> int:
    """Count the directions, largest variance first, that together hold `SHARE` of the variance; 0 if there is none."""
    variances_Z = torch.linalg.eigvalsh(covariance_ZZ.double()).clamp(min=0).flip(0)
    total = variances_Z.sum()
    return int((variances_Z.cumsum(0) < SHARE * total).sum()) + 1 if total > 0 else 0


def covariance(vectors_NZ: Tensor) -> Tensor:
    """Return the covariance (Z, Z) of vectors, float64."""
    centred_NZ = vectors_NZ.double() - vectors_NZ.double().mean(0)
    return centred_NZ.T @ centred_NZ / len(centred_NZ)
