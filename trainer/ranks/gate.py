"""Whether the optimizer takes a step, decided where the gradients are, so that the host does not wait for them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

NO_LIMIT = sys.float_info.max
"""A limit that every finite norm keeps."""
NO_STEP = -1.0
"""A limit that no norm keeps."""


@dataclass(frozen=True)
class Gate:
    """Lets a step pass if its loss and its gradient norm are finite and the norm is not above a limit."""

    loss: Tensor
    """(): the mean loss of the global batch, on the device of the gradients."""
    largest_norm: float
    """The largest gradient norm, before clipping, that passes; `NO_LIMIT` if only finiteness counts."""

    def closed(self, norm: Tensor) -> Tensor:
        """Return 1.0 where a step of this gradient norm must not be taken, else 0.0: a float32 scalar on the device.

        torch's fused optimizers leave weights and moments as they are where their `found_inf` is 1.0.
        """
        passes = torch.isfinite(self.loss) & (norm.double() <= self.largest_norm)
        return (~passes).float()

    def passes(self, norm: float) -> bool:
        """Decide the same on the host, which waits for the loss."""
        return not self.closed(torch.tensor(norm, dtype=torch.float64, device=self.loss.device)).item()
