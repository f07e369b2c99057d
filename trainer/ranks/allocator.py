"""Settings of the allocators of memory: torch's on a GPU, and the C library's on a CPU."""

from __future__ import annotations

import ctypes
import os

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The variable that torch reads at a process's first allocation on a GPU, and older names, which torch takes first."""

_MALLOC_NAMES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
"""Variables by which users set what glibc gives back to the system; `GLIBC_TUNABLES` is the newer way."""
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of `mallopt`, from glibc's malloc.h


def prepare_allocator() -> None:
    """Let segments of GPU memory grow, so that batches of other lengths fragment it less; what the user set stays.

    This has to be called before the first allocation on a GPU. Ranks that are started later inherit it.
    """
    if not any(name in os.environ for name in _NAMES):
        os.environ[_NAMES[0]] = "expandable_segments:True"


def keep_freed_memory() -> None:
    """Let this process keep the host memory that it frees, for its next allocations; what the user set stays.

    Otherwise glibc gives large freed blocks back to the system. A training step on a CPU frees all its activations and
    allocates them again, and the system then has to map and clear their pages in every step. Other C libraries than
    glibc decide for themselves.
    """
    if any(name in os.environ for name in _MALLOC_NAMES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, -1)  # never shrink the heap
        mallopt(_MMAP_MAX, 0)  # take large blocks from the heap, too, not from a mapping of their own
