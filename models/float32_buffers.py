"""A module whose buffers stay in float32 when the model around it is converted to a lower precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """Base class of modules that training starts from: each strategy has to start from the same numbers."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to a device, but not to a lower precision."""

        def moved(value: Tensor) -> Tensor:
            # `fn` may also give memory to a tensor that has none yet, which nothing can be copied from
            found = fn(value)
            return found if found.dtype == value.dtype else value.to(found.device)

        super()._apply(moved, recurse)
        return self
