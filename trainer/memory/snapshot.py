"""A snapshot of a GPU's memory, kept when it runs out, for https://pytorch.org/memory_viz.

torch writes the snapshot as a pickle, which is the only form that the viewer takes. Nothing here ever reads one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from models.atomic_write import replacing

logger = logging.getLogger(__name__)


@contextmanager
def memory_history(device: torch.device, entries: int) -> Iterator[None]:
    """Record the newest allocations and releases of a GPU within the block, for a snapshot of its memory.

    Args:
        device: this rank's device; nothing is recorded of a CPU.
        entries: how many allocations and releases are kept; 0: nothing is recorded.
    """
    if device.type != "cuda" or not entries:
        yield
        return
    # The stack of a release, and C++ frames, would cost as much again and say less.
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=entries)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(None)


def keep_snapshot(device: torch.device, path: Path) -> str:
    """Write a snapshot of a GPU's memory; return a sentence that names the file, or an empty text if there is none.

    Args:
        device: this rank's device; a CPU has no snapshot.
        path: the file to write, which appears whole or not at all.
    """
    if device.type != "cuda":
        return ""
    try:
        with replacing(path) as partial:
            torch.cuda.memory._dump_snapshot(str(partial))
    except Exception as error:  # after some errors CUDA answers nothing any more, and the disk may be full
        logger.warning("no snapshot of the memory is kept: %s", error)
        return ""
    return f"{path} holds what was in the memory: drop it on https://pytorch.org/memory_viz"
