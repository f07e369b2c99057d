"""The threads that read batches ahead."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

_POLL_SECONDS = 0.25  # between two calls of `give_up` while a batch is awaited


class ReaderPool(ThreadPoolExecutor):
    """Threads that read batches; on exit the pool waits for them, unless `give_up` returns true, as they may hang."""

    def __init__(self, threads: int, give_up: Callable[[], bool]) -> None:
        super().__init__(threads, "latents")
        self.give_up = give_up

    def __exit__(self, *error: object) -> None:
        self.shutdown(wait=not self.give_up(), cancel_futures=True)


def wait_for(batch: Future[Result], give_up: Callable[[], bool]) -> Result | None:
    """Wait for a batch and return it, or None once `give_up` returns true."""
    while True:
        try:
            return batch.result(timeout=_POLL_SECONDS)
        except TimeoutError:
            if batch.done():
                return batch.result()  # the reader itself raised the TimeoutError
            if give_up():
                return None
