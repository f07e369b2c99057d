"""Where z starts: the principal components of the features in a block of frames, before anything is learned.

g adds what its Transformer learns to these components, and f adds what it learns to the features that they stand for.
Without such a start z is noise that D first learns to ignore, and a short training leaves most channels of z unused.

Shape suffixes: B batch, N z vectors, F features of a block, Z channels of z, T frames, C features of a frame.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.float32_buffers import Float32Buffers

_MOST_FEATURES = 2048
"""Most features whose covariance is computed. A larger block is first reduced to the low orders of its DCT in time."""


class BlockPCA(Float32Buffers):
    """A fixed affine map between a block's features (…, F) and z (…, Z), and back to the nearest features.

    Direction k of the PCA has the standard deviation s_k over the data. z holds the component along it divided by
    s_k^whitening, and all of z is scaled to a mean variance of 1. Before `fit`, z is zero.
    """

    directions: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, z_channels: int) -> None:
        super().__init__()
        self.register_buffer("directions", torch.zeros(z_channels, features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(z_channels))

    def forward(self, block_BNF: Tensor) -> Tensor:
        """Return z (B, N, Z) of the features (B, N, F), in float32 whatever the precision of training."""
        with torch.autocast(block_BNF.device.type, enabled=False):
            return (block_BNF.float() - self.mean) @ (self.directions / self.scale[:, None]).T

    def features(self, z_BNZ: Tensor) -> Tensor:
        """Return the features (B, N, F) that z stands for: the mean where z is zero."""
        return z_BNZ @ self.features_of_channels() + self.mean

    def features_of_channels(self) -> Tensor:
        """Return by how much each channel of z changes the features: (Z, F)."""
        return self.directions * self.scale[:, None]

    @torch.no_grad()
    def fit(self, moments: BlockMoments, *, whitening: float) -> float:
        """Take the directions of the largest variance from the moments of many blocks; return their share of it.

        Channels of z beyond the number of directions stay zero. Directions in which nothing varies count as none.
        """
        mean_F, covariance_FF = moments.mean(), moments.covariance()
        variance_F, vectors_FF = torch.linalg.eigh(covariance_FF)
        order = variance_F.argsort(descending=True)[: len(self.directions)]
        order = order[variance_F[order] > 1e-8 * variance_F.max()]
        directions_ZF = _with_fixed_sign(vectors_FF[:, order].T)
        deviation_Z = variance_F[order].sqrt()
        scale_Z = deviation_Z**whitening
        scale_Z *= (deviation_Z / scale_Z).square().mean().sqrt()
        used = len(order)
        self.directions.zero_()[:used] = moments.to_frames(directions_ZF)
        self.scale.fill_(1.0)[:used] = scale_Z
        self.mean.copy_(moments.to_frames(mean_F[None])[0])
        return float(variance_F[order].sum() / moments.variance())


class BlockMoments:
    """Sums from which the mean and the covariance of blocks' features follow, in float64.

    A block of many frames is reduced to the low orders of its DCT in time first, because what varies most in it varies
    slowly. With all orders, which a block of up to `_MOST_FEATURES` features keeps, the PCA is exact.
    """

    def __init__(self, frames: int, features: int) -> None:
        self.features = features
        self.basis_OT = _dct(frames)[: max(1, min(frames, _MOST_FEATURES // features))]
        self.size = size = len(self.basis_OT) * features
        self.count = 0
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._squares = 0.0
        self._products = torch.zeros(size, size, dtype=torch.float64)

    def add(self, blocks_RTC: Tensor) -> None:
        """Add blocks of features, (rows, frames, features)."""
        reduced_RF = torch.einsum("ot,rtc->roc", self.basis_OT, blocks_RTC.double().cpu()).flatten(1)
        self.count += len(reduced_RF)
        self._sum += reduced_RF.sum(0)
        self._squares += float(blocks_RTC.double().square().sum())
        self._products += reduced_RF.T @ reduced_RF

    def mean(self) -> Tensor:
        """Return the mean of the reduced features."""
        return self._sum / max(self.count, 1)

    def covariance(self) -> Tensor:
        """Return the covariance of the reduced features."""
        mean_F = self.mean()
        return self._products / max(self.count, 1) - mean_F[:, None] * mean_F

    def variance(self) -> float:
        """Return the variance of whole blocks, summed over all their features, with the orders that were left out."""
        return float((self._squares - self.count * self.mean().square().sum()) / max(self.count, 1))

    def to_frames(self, reduced_RF: Tensor) -> Tensor:
        """Turn reduced features (rows, …) back to features of whole blocks (rows, frames · features), in float32."""
        orders_ROC = reduced_RF.unflatten(1, (-1, self.features))
        return torch.einsum("ot,roc->rtc", self.basis_OT, orders_ROC).flatten(1).float()


def _dct(frames: int) -> Tensor:
    """Return the orthonormal DCT-II: (orders, frames), float64."""
    order, frame = torch.arange(frames, dtype=torch.float64)[:, None], torch.arange(frames, dtype=torch.float64)
    basis_OT = torch.cos(math.pi / frames * (frame + 0.5) * order) * math.sqrt(2 / frames)
    basis_OT[0] /= math.sqrt(2)
    return basis_OT


def _with_fixed_sign(directions_ZF: Tensor) -> Tensor:
    """Choose of each direction and its opposite the one whose largest component is positive."""
    largest_Z1 = directions_ZF.abs().argmax(dim=1, keepdim=True)
    return directions_ZF * directions_ZF.gather(1, largest_Z1).sign()
