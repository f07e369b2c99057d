"""Imports that start no threads and leave CUDA alone, so that the process can be forked afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_QUIET = {"OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""numpy's BLAS starts its threads as it is imported. torch then asks the driver's library for GPUs, and not CUDA."""


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Within the block, importing numpy starts no threads, and torch does not begin to use CUDA."""
    before = {name: os.environ.get(name) for name in _QUIET}
    os.environ |= _QUIET
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
