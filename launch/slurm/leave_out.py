"""Requeues a job without the nodes that have failed: SLURM takes `ExcNodeList` for a job that waits, and for no other.

`scontrol requeue` sends this process SIGTERM, and SIGKILL after KillWait. It ignores the first, and changes the job as
soon as SLURM has made it one that waits.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch.slurm import scheduler

_PATIENCE = 4.0  # seconds, less than any cluster's KillWait
_PAUSE = 0.1


def left_out(lines: Iterable[Mapping[str, Any]], job: str) -> list[str]:
    """Return the nodes that a job has left out so far, by the lines of its history."""
    found = [node for line in lines if line.get("job") == job for node in line.get("left_out", ())]
    return list(dict.fromkeys(found))


def chosen(faulty: Sequence[str], before: Sequence[str], most: int) -> list[str]:
    """Return which of the nodes to leave out, so that a job leaves out no more than `most` in all."""
    return [node for node in faulty if node not in before][: max(0, most - len(before))]


def requeue_without(job: str, nodes: Sequence[str]) -> None:
    """Requeue a job, and leave out some nodes beside those that it leaves out already. Raises QueueError.

    A job that was requeued, but whose list of nodes SLURM does not change, comes back without a word.
    """
    already = scheduler.show(job).get("ExcNodeList", "(null)")
    names = [*([] if already == "(null)" else re.split(r",(?![^\[]*\])", already)), *nodes]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    scheduler.control("requeue", job)
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            scheduler.control("update", f"JobId={job}", f"ExcNodeList={','.join(dict.fromkeys(names))}")
            return
        except scheduler.QueueError:
            if time.monotonic() > until:
                return
        time.sleep(_PAUSE)
