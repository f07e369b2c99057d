"""Checkpoints written beside training.

Nothing of what is saved changes until the next optimizer step: so the copy to host memory is made beside that step's
forward and backward pass, and written beside those after it. Training stands still where the copy is not done by then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import torch

from trainer.checkpoints import checkpoint
from trainer.ranks import collective
from trainer.ranks.flat_ranges import FlatRange
from trainer.recipes.schema import CheckpointConfig

_PATIENCE = 60.0  # seconds that a failing run waits for the save under way


@dataclass(frozen=True)
class _Order:
    samples: int
    tensors: Mapping[str, FlatRange]
    meta: Mapping[str, Any]
    ready: torch.cuda.Event | None
    """When this rank's GPU has come to what is to be copied; None without one."""


class Saver:
    """Saves one checkpoint at a time, on all ranks together, in a thread with a process group of its own.

    Use it in a `with`: on leaving it waits for the save under way.
    """

    def __init__(
        self, directory: Path, settings: CheckpointConfig, *, permitted: Callable[[], None] = lambda: None
    ) -> None:
        """`permitted` raises where this process may no longer write."""
        self.directory, self.settings = directory, settings
        self.permitted = permitted
        self.stalled = 0.0
        """Seconds that training stood still for the last save."""
        self.took = 0.0
        """Seconds that the last save took until it was whole."""
        self._group = collective.own_group()
        self._host = _HostMemory()
        self._copied, self._written = threading.Event(), threading.Event()
        self._copied.set()
        self._written.set()
        self._error: Exception | None = None
        self._orders: SimpleQueue[_Order | None] = SimpleQueue()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        threading.Thread(target=self._serve, args=(device,), name="checkpoint", daemon=True).start()

    def save(self, samples: int, tensors: Mapping[str, FlatRange], meta: Mapping[str, Any]) -> None:
        """Have a checkpoint made of this rank's ranges, which may change once `copied` returns. All ranks.

        Raises:
            OSError, ValueError: what the save before failed with.
        """
        start = time.perf_counter()
        self.wait()
        self._copied.clear()
        self._written.clear()
        ready = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        self._orders.put(_Order(samples, tensors, dict(meta), ready))
        self.stalled = time.perf_counter() - start

    def copied(self) -> None:
        """Until the copy is made: to be called before anything that is saved changes."""
        if not self._copied.is_set():
            start = time.perf_counter()
            self._copied.wait()
            self.stalled += time.perf_counter() - start

    @property
    def failed(self) -> bool:
        """Whether the last save failed here, as far as is known; ranks come to know it one after another."""
        return self._error is not None

    def wait(self) -> None:
        """Until what was saved is on the disk. All ranks.

        Raises:
            OSError, ValueError: what the save failed with, the same on every rank.
        """
        self._written.wait()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _serve(self, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)  # each thread has its own, and begins with the first
        while (order := self._orders.get()) is not None:
            begun = time.perf_counter()
            try:
                self._write(order)
                self.took = time.perf_counter() - begun
            except Exception as error:  # raised in the training's thread, by `wait`
                self._error = error
            self._written.set()

    def _write(self, order: _Order) -> None:
        copies: dict[str, FlatRange] = {}

        def copy() -> None:
            try:
                copies.update(self._host.copy(order.tensors, order.ready))
            finally:
                self._copied.set()

        collective.together(copy, self._group)
        checkpoint.save(self.directory, order.samples, copies, order.meta, group=self._group, permitted=self.permitted)
        keep = self.settings
        checkpoint.prune(self.directory, last=keep.keep_last, best=keep.keep_best, every=keep.keep_every)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._orders.put(None)
        if error is None:
            self.wait()
        else:
            self._written.wait(_PATIENCE)  # a rank that died would be waited for without end


class _HostMemory:
    """One piece of host memory, used again by each save: touching new memory takes longer than the copy."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)
        self.stream: torch.cuda.Stream | None = None

    def copy(self, tensors: Mapping[str, FlatRange], ready: torch.cuda.Event | None) -> dict[str, FlatRange]:
        """The ranges as they are now."""
        total = sum(owned.data.numel() for owned in tensors.values())
        if self.memory.numel() < total:
            self.memory = torch.empty(total, pin_memory=ready is not None)
        if ready is not None:
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_event(ready)
        copies, start = {}, 0
        with torch.cuda.stream(self.stream):  # does nothing where there is none
            for name, owned in tensors.items():
                here = self.memory[start : start + owned.data.numel()]
                here.copy_(owned.data, non_blocking=True)
                copies[name] = FlatRange(here, owned.shape, owned.start)
                start += owned.data.numel()
        if self.stream is not None:
            self.stream.synchronize()
        return copies
