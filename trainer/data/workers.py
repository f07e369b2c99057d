"""Worker processes: they exit together with their parent, and the death of a worker is reported."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager


def exit_with_parent() -> None:
    """In a worker: ignore Ctrl-C, which the parent handles, and exit once the parent is dead, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def explain_dead_workers() -> Iterator[None]:
    """Raise ValueError if a worker of a process pool dies in the block."""
    try:
        yield
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker died, perhaps because memory ran out: run the same command again with fewer workers, to resume"
        ) from error
