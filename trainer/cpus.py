"""How many CPU cores and threads this process may use, which may be fewer than the machine has."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """Return the number of cores that this process may run on: a container or a job may have a part of a machine."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        return os.cpu_count() or 1


def usable_threads(ranks: int) -> int:
    """Return the threads of one of `ranks` processes on this machine: OMP_NUM_THREADS, or its part of the cores."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # `4,2` sets nested levels
    if first.isdecimal() and int(first) > 0:
        return int(first)
    return max(1, usable_cpus() // ranks)


def let_threads_sleep() -> None:
    """Let threads that wait for others sleep sooner; to be called before torch is imported.

    By default they spin for milliseconds, and where another program takes a core, the one thread that all others wait
    for gets none. Spins of some 0.1 ms cost nothing on two quiet cores, and made steps with two threads 4 to 10 times
    faster on two busy ones. What the user has set for OpenMP stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
