"""Checkpoints written beside training: training stands still for a copy to host memory, no longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from trainer import checkpoint, collective
from trainer.config import CheckpointConfig
from trainer.ranges import FlatRange

_PATIENCE = 60.0  # seconds that a failing run waits for the save under way


class Saver:
    """Saves one checkpoint at a time, on all ranks together, in a thread with a process group of its own.

    Use it in a `with`: on leaving it waits for the save under way.
    """

    def __init__(self, directory: Path, settings: CheckpointConfig) -> None:
        self.directory, self.settings = directory, settings
        self.stalled = 0.0
        """Seconds that training stood still for the last save."""
        self._group = collective.own_group()
        self._host = _HostMemory()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, samples: int, tensors: Mapping[str, FlatRange], meta: Mapping[str, Any]) -> None:
        """Copy this rank's ranges and have them written; see `checkpoint.save`. All ranks.

        Raises:
            OSError, ValueError: what the save before failed with.
        """
        start = time.perf_counter()
        self.wait()
        copies = self._host.copy(tensors)
        self._thread = threading.Thread(
            target=self._write, args=(samples, copies, dict(meta)), name="checkpoint", daemon=True
        )
        self._thread.start()
        self.stalled = time.perf_counter() - start

    @property
    def failed(self) -> bool:
        """Whether the last save failed here, as far as is known; ranks come to know it one after another."""
        return self._error is not None

    def wait(self) -> None:
        """Until what was saved is on the disk. All ranks.

        Raises:
            OSError, ValueError: what the save failed with, the same on every rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, samples: int, tensors: Mapping[str, FlatRange], meta: Mapping[str, Any]) -> None:
        keep = self.settings
        try:
            checkpoint.save(self.directory, samples, tensors, meta, group=self._group)
            checkpoint.prune(self.directory, last=keep.keep_last, best=keep.keep_best, every=keep.keep_every)
        except Exception as error:  # raised in the training's thread, by `wait`
            self._error = error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join(_PATIENCE)  # a rank that died would be waited for without end


class _HostMemory:
    """One piece of host memory, used again by each save: touching new memory takes longer than the copy."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def copy(self, tensors: Mapping[str, FlatRange]) -> dict[str, FlatRange]:
        """The ranges as they are now."""
        total = sum(len(owned.data) for owned in tensors.values())
        devices = {owned.data.device for owned in tensors.values() if owned.data.is_cuda}
        if len(self.memory) < total:
            self.memory = torch.empty(total, pin_memory=bool(devices))
        copies, start = {}, 0
        for name, owned in tensors.items():
            here = self.memory[start : start + len(owned.data)]
            here.copy_(owned.data, non_blocking=True)
            copies[name] = FlatRange(here, owned.shape, owned.start)
            start += len(owned.data)
        for device in devices:
            torch.cuda.synchronize(device)
        return copies
