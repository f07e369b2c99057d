"""Asynchronous saving: checkpoints, and snapshots of the averages, are written while training continues.

The saved tensors do not change until the next optimizer step. The copy to host memory therefore overlaps with that
step's forward and backward passes, and writing the copy to disk overlaps with later steps. Training stands still only
if the copy is not finished by the next optimizer step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import torch

from trainer.checkpoints import checkpoint, snapshots
from trainer.checkpoints.names import folder_name
from trainer.ranks import collective
from trainer.ranks.flat_ranges import FlatRange
from trainer.recipes.schema import CheckpointConfig

_GRACE_PERIOD = 60.0  # seconds that a failing run waits for a save in progress


@dataclass(frozen=True)
class _Request:
    directory: Path
    samples: int
    tensors: Mapping[str, FlatRange]
    meta: Mapping[str, Any]
    ready: torch.cuda.Event | None
    """Recorded after the GPU work that computes the tensors; None without a GPU."""
    prune: Callable[[], object]
    """Called after the save, on all ranks: deletes what is not to be kept in the directory."""


class Saver:
    """Saves one checkpoint at a time, on all ranks together, in a thread with its own process group.

    Use it as a context manager: on exit, it waits for a save in progress.
    """

    def __init__(
        self,
        directory: Path,
        settings: CheckpointConfig,
        *,
        require_ownership: Callable[[], None] = lambda: None,
        hand_over: Callable[[Path], Collection[Path]] = lambda saved: (),
    ) -> None:
        """Create the process group and the thread. All ranks.

        Args:
            directory: the folder of the run's checkpoints.
            settings: which of them are kept.
            require_ownership: called on rank 0 before a save writes; raises if a later start has taken the run over.
            hand_over: called with each checkpoint that is complete; returns those that may not be deleted yet.
        """
        self.directory, self.settings = directory, settings
        self.require_ownership, self.hand_over = require_ownership, hand_over
        self.waited_seconds = 0.0
        """Seconds that training stood still for the last save."""
        self.write_seconds = 0.0
        """Seconds from the start of the last save until its checkpoint was complete."""
        self._group = collective.own_group()
        self._host = _HostMemory()
        self._copied, self._written = threading.Event(), threading.Event()
        self._copied.set()
        self._written.set()
        self._error: Exception | None = None
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        threading.Thread(target=self._serve, args=(device,), name="checkpoint", daemon=True).start()

    def save(self, samples: int, tensors: Mapping[str, FlatRange], meta: Mapping[str, Any]) -> None:
        """Start saving this rank's ranges, which must not change until `copied` returns. All ranks.

        Raises:
            OSError, ValueError: the error of the previous save.
        """
        keep = self.settings

        def prune() -> None:
            held = self.hand_over(self.directory / folder_name(samples))
            checkpoint.prune(self.directory, last=keep.keep_last, best=keep.keep_best, every=keep.keep_every, held=held)

        self._begin(self.directory, samples, tensors, meta, prune)

    def save_snapshot(
        self, directory: Path, samples: int, averages: Mapping[str, FlatRange], meta: Mapping[str, Any], *, every: int
    ) -> None:
        """Start saving a snapshot of the averages (`checkpoints.snapshots`), in the way of `save`. All ranks.

        `every` is the interval of the snapshots that are kept, in samples.
        """
        self._begin(directory, samples, averages, meta, lambda: snapshots.prune(directory, every))

    def _begin(
        self,
        directory: Path,
        samples: int,
        tensors: Mapping[str, FlatRange],
        meta: Mapping[str, Any],
        prune: Callable[[], object],
    ) -> None:
        start = time.perf_counter()
        self.wait()
        self._copied.clear()
        self._written.clear()
        ready = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        self._requests.put(_Request(directory, samples, tensors, dict(meta), ready, prune))
        self.waited_seconds = time.perf_counter() - start

    def wait_for_copy(self) -> None:
        """Wait until the copy is made. Call this before any saved tensor changes."""
        if not self._copied.is_set():
            start = time.perf_counter()
            self._copied.wait()
            self.waited_seconds += time.perf_counter() - start

    @property
    def failed(self) -> bool:
        """Whether the last save is known to have failed. Ranks learn of a failure at different times."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until the checkpoint is on disk. All ranks.

        Raises:
            OSError, ValueError: the error of the save, the same on every rank.
        """
        self._written.wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _serve(self, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)  # The current device is per thread, and a new thread's is the first GPU.
        while (request := self._requests.get()) is not None:
            begun = time.perf_counter()
            try:
                self._write(request)
                if request.directory == self.directory:
                    self.write_seconds = time.perf_counter() - begun
            except Exception as error:  # `wait` raises it in the training thread.
                self._error = error
            self._written.set()

    def _write(self, request: _Request) -> None:
        copies: dict[str, FlatRange] = {}

        def copy() -> None:
            try:
                copies.update(self._host.copy(request.tensors, request.ready))
            finally:
                self._copied.set()

        collective.together(copy, self._group)
        checkpoint.save(
            request.directory,
            request.samples,
            copies,
            request.meta,
            group=self._group,
            require_ownership=self.require_ownership,
        )
        request.prune()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._requests.put(None)
        if error is None:
            self.wait()
        else:
            self._written.wait(_GRACE_PERIOD)  # If another rank has died, the save never ends.


class _HostMemory:
    """A host buffer that every save reuses: the first access to new memory takes longer than the copy itself."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)
        self.stream: torch.cuda.Stream | None = None

    def copy(self, tensors: Mapping[str, FlatRange], ready: torch.cuda.Event | None) -> dict[str, FlatRange]:
        """Copy the ranges into the buffer; returns the copies. `ready`: see `_Request`."""
        total = sum(owned.data.numel() for owned in tensors.values())
        if self.memory.numel() < total:
            self.memory = torch.empty(total, pin_memory=ready is not None)
        if ready is not None:
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_event(ready)
        copies, start = {}, 0
        with torch.cuda.stream(self.stream):  # This does nothing if the stream is None.
            for name, owned in tensors.items():
                here = self.memory[start : start + owned.data.numel()]
                here.copy_(owned.data, non_blocking=True)
                copies[name] = FlatRange(here, owned.shape, owned.start)
                start += owned.data.numel()
        if self.stream is not None:
            self.stream.synchronize()
        return copies
