"""The inputs of a stage's module: one object, which the stream passes through the strategy to the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A micro batch of b samples."""

    x0: Tensor
    """(b, C, T): crops of the samples' latents, 0 where a shorter sample is padded; float16 in host memory, float32 on
    the device."""
    positions: Tensor
    """(b,), int64: the samples' positions in the stream, which key all random numbers of the samples."""
    mask: Tensor | None = None
    """(b, T), bool: true for real frames, false for padding. None: no frame is padding."""
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    """D's inputs in addition to z, of b rows each, by the names of D's arguments, such as `text` and `text_mask`. Empty
    if the stream reads no conditions (`trainer.data.conditions`)."""

    def to(self, device: torch.device) -> Inputs:
        """Return the inputs on a device, with x0 in float32."""
        return Inputs(
            x0=self.x0.to(device).float(),
            positions=self.positions.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            conditions={name: value.to(device) for name, value in self.conditions.items()},
        )
