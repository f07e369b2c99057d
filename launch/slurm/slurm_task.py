"""Translates SLURM's environment of a task into the environment of a torch rank."""

from __future__ import annotations

import os
import re
import socket
import zlib
from dataclasses import dataclass

from launch.slurm import scheduler

_PORTS = range(10_000, 32_000)  # below the range from which the kernel assigns ports to connections
_TRIES = 100


@dataclass(frozen=True)
class SlurmTask:
    """One task of a job step."""

    rank: int
    count: int
    local_rank: int
    local_counts: tuple[int, ...]
    """Number of tasks on each node."""

    @classmethod
    def here(cls) -> SlurmTask:
        """Return the task that this process is, from SLURM's environment variables."""
        counts = local_counts(os.environ["SLURM_STEP_TASKS_PER_NODE"])
        return cls(int(os.environ["SLURM_PROCID"]), sum(counts), int(os.environ["SLURM_LOCALID"]), tuple(counts))

    def join(self, ranks: int) -> None:
        """Set the environment of torch, with the first `ranks` tasks as ranks. The batch script has set MASTER_ADDR and
        MASTER_PORT."""
        first = self.rank - self.local_rank
        node_count = self.local_counts[int(os.environ["SLURM_NODEID"])]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        one_device = len(visible) == 1 and visible[0] != "" and node_count > 1  # SLURM shows each task one GPU alone
        os.environ |= {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": "0" if one_device else str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(min(ranks - first, node_count)),
        }

    @property
    def threads(self) -> int:
        """Number of CPU threads for this task."""
        own = os.environ.get("SLURM_CPUS_PER_TASK")
        return int(own or max(1, len(os.sched_getaffinity(0)) // self.local_counts[int(os.environ["SLURM_NODEID"])]))


def local_counts(text: str) -> list[int]:
    """Expand SLURM's list of task counts: `2(x3),1` → 2, 2, 2, 1."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def rendezvous(token: str) -> dict[str, str]:
    """Return the rendezvous of the ranks: this node, the job's first, and a free port derived from `token`."""
    first = scheduler.hostnames(os.environ["SLURM_JOB_NODELIST"])[0]
    return {"MASTER_ADDR": _reachable(first), "MASTER_PORT": str(free_port(token))}


def free_port(token: str) -> int:
    """Return a free port of this host: the first free one in a sequence derived from `token`. Raises OSError."""
    for number in range(_TRIES):
        port = _PORTS[zlib.crc32(f"{token}/{number}".encode()) % len(_PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of {_TRIES} ports below {_PORTS[-1]} is free on {socket.gethostname()}")


def _reachable(node: str) -> str:
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:  # the name of a node need not be a host name
        return scheduler.address_of(node)
