"""Settings of torch's allocator of GPU memory."""

from __future__ import annotations

import os

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The variable that torch reads at a process's first allocation on a GPU, and older names, which torch takes first."""


def prepare_allocator() -> None:
    """Let segments of GPU memory grow, so that batches of other lengths fragment it less; what the user set stays.

    This has to be called before the first allocation on a GPU. Ranks that are started later inherit it.
    """
    if not any(name in os.environ for name in _NAMES):
        os.environ[_NAMES[0]] = "expandable_segments:True"
