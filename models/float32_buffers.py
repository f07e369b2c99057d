"""A module whose buffers stay in float32 when the model around it is converted to a lower precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """Base class of modules that training starts from: each strategy has to start from the same numbers."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to a device, but not to a lower precision."""
        super()._apply(lambda value: value.to(fn(value).device), recurse)
        return self
