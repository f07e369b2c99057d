"""Numbers that the device computes and the host reads later."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """The values of a tensor, which are copied to host memory once the device has computed them.

    The host goes on meanwhile, and waits only if it calls `read` before the copy is done.
    """

    def __init__(self, values: Tensor) -> None:
        self._on_host, self._copied = values, None
        if values.device.type == "cuda":
            self._on_host = torch.empty_like(values, device="cpu", pin_memory=True)
            self._on_host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """Return the values of the one-dimensional tensor."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._on_host.tolist()
