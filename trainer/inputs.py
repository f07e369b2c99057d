"""What goes into a stage's module: one object, passed whole from the stream through the strategy to the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A micro batch of b samples."""

    x0: Tensor
    """(b, C, T): crops of the samples' latents, 0 where a shorter sample is padded. float16 in host memory, float32
    where a module computes with them."""
    positions: Tensor
    """(b,), int64: the samples' places in the stream; all randomness about a sample is keyed by its place."""
    mask: Tensor | None = None
    """(b, T), bool: true where a frame is the sample's own. None: all are."""
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    """What D is told beside z, by the names of D's arguments, such as `text` and `text_mask`; b rows each. Empty where
    the stream reads none (`trainer.data.conditions`)."""

    def to(self, device: torch.device) -> Inputs:
        """The same on a device, x0 in float32."""
        return Inputs(
            x0=self.x0.to(device).float(),
            positions=self.positions.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            conditions={name: value.to(device) for name, value in self.conditions.items()},
        )
