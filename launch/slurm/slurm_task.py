"""A task of a job as a rank among the others: what SLURM's environment says, in the words that torch reads."""

from __future__ import annotations

import os
import re
import socket
import zlib
from dataclasses import dataclass

from launch.slurm import scheduler

_PORTS = range(10_000, 32_000)  # below those that the kernel gives to connections
_TRIES = 100


@dataclass(frozen=True)
class SlurmTask:
    """One task of a job step."""

    rank: int
    count: int
    local_rank: int
    local_counts: tuple[int, ...]
    """Tasks on each node."""

    @classmethod
    def here(cls) -> SlurmTask:
        """This process, by SLURM's environment."""
        counts = local_counts(os.environ["SLURM_STEP_TASKS_PER_NODE"])
        return cls(int(os.environ["SLURM_PROCID"]), sum(counts), int(os.environ["SLURM_LOCALID"]), tuple(counts))

    def join(self, ranks: int) -> None:
        """Set what torch reads, for the first so many tasks as ranks. MASTER_ADDR and MASTER_PORT are the script's."""
        first = self.rank - self.local_rank
        node_count = self.local_counts[int(os.environ["SLURM_NODEID"])]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        one_device = len(visible) == 1 and visible[0] != "" and node_count > 1  # SLURM gave each task a GPU of its own
        os.environ |= {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": "0" if one_device else str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(min(ranks - first, node_count)),
        }

    @property
    def threads(self) -> int:
        """CPU threads that are this task's own."""
        own = os.environ.get("SLURM_CPUS_PER_TASK")
        return int(own or max(1, len(os.sched_getaffinity(0)) // self.local_counts[int(os.environ["SLURM_NODEID"])]))


def local_counts(text: str) -> list[int]:
    """`2(x3),1` → 2, 2, 2, 1."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def rendezvous(token: str) -> dict[str, str]:
    """Where the ranks meet: on this, the job's first node, at a port that depends on the start and is free now."""
    first = scheduler.hostnames(os.environ["SLURM_JOB_NODELIST"])[0]
    return {"MASTER_ADDR": _reachable(first), "MASTER_PORT": str(free_port(token))}


def free_port(token: str) -> int:
    """A port of this host that nobody listens at: the first that is free of those that a name gives."""
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
    except OSError:  # a node's name need not be a host's
        return scheduler.address_of(node)
