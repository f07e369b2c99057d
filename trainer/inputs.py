"""The inputs of a stage's module: one object, which the stream passes through the strategy to the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    draws: Mapping[str, Tensor] = field(default_factory=dict)
    """What the module drew for these samples in host memory, by the names of `Objective.draws`; empty: nothing yet."""
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    """D's inputs in addition to z, of b rows each, by the names of D's arguments, such as `text` and `text_mask`. Empty
    if the stream reads no conditions (`trainer.data.conditions`)."""

    def to(self, device: torch.device, draws: Mapping[str, Tensor] | None = None) -> Inputs:
        """Return the inputs on a device, with x0 in float32, and with `draws` in place of those here.

        The host does not wait for copies to CUDA, and the caller may overwrite its tensors at once.
        """
        draws = self.draws if draws is None else draws
        return Inputs(
            x0=moved(self.x0, device).float(),
            positions=moved(self.positions, device),
            mask=None if self.mask is None else moved(self.mask, device),
            draws={name: moved(value, device) for name, value in draws.items()},
            conditions={name: moved(value, device) for name, value in self.conditions.items()},
        )

    def named(self) -> dict[str, Tensor]:
        """Return all tensors that are there, each by a name of its own."""
        groups = {"draws": self.draws, "conditions": self.conditions}
        named = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
        if self.mask is not None:
            named["mask"] = self.mask
        return {"x0": self.x0, "positions": self.positions, **named}

    def changed(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Return the inputs with each tensor replaced by what `change` returns for it."""
        return Inputs(
            x0=change(self.x0),
            positions=change(self.positions),
            mask=None if self.mask is None else change(self.mask),
            draws={name: change(value) for name, value in self.draws.items()},
            conditions={name: change(value) for name, value in self.conditions.items()},
        )


def moved(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. The host does not wait for a copy to CUDA, and may overwrite `value` at once."""
    if device.type != "cuda" or value.device.type != "cpu":
        return value.to(device)
    # torch's allocator keeps the pinned memory until the copy is done.
    return value.pin_memory().to(device, non_blocking=True)
