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

    By default they spin for milliseconds, and where other programs take the cores, the one thread that all others wait
    for may get none. Spins of some 0.1 ms cost nothing that could be measured on two quiet cores (88 ms a step against
    86; 120 without any spin). On two busy ones, steps took from as long to a fifth as long. What the user has set for
    OpenMP stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
