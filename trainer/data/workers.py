"""Processes that share work on this machine: none outlives its parent, and one that dies is explained."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager


def follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent was killed, for which a pool would wait."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def explained_death() -> Iterator[None]:
    """Around the use of a pool; raises ValueError where a worker was killed."""
    try:
        yield
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker died, perhaps for want of memory: run the same again with fewer workers, it goes on from here"
        ) from error
