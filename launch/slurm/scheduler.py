"""What SLURM says of jobs. The queue is asked first, as accounting is late and not everywhere."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

_PATIENCE = 20.0  # seconds: a controller that is down makes a command try for nine
ENDED_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
}
"""States of a job that does not come back by itself. Of the queue's: accounting says them of a requeued one too."""


class QueueError(OSError):
    """SLURM gave no answer."""


@dataclass(frozen=True)
class JobState:
    """A job as it is now."""

    job: str
    """Its number; of an array, `12_3`."""
    state: str
    """As squeue has it: PENDING, RUNNING, COMPLETING …; GONE where nothing knows of it any more."""
    nodes: str = ""
    """The nodes that it is on, as SLURM lists them."""
    reason: str = ""
    """Why it waits."""

    @property
    def alive(self) -> bool:
        """Whether it runs, or will by itself."""
        return self.state not in ENDED_STATES and self.state != "GONE"


def states(jobs: list[str]) -> dict[str, list[JobState]]:
    """The jobs of each number given, several where it is an array's.

    Raises:
        QueueError: there is no SLURM here, or its controller does not answer.
    """
    if not jobs:
        return {}
    found: dict[str, list[JobState]] = {job: [] for job in jobs}
    text = _ask("squeue", "--noheader", "--all", "--states=all", "--format=%F|%i|%T|%N|%r", f"--jobs={','.join(jobs)}")
    for line in text.splitlines():
        whole, job, state, nodes, reason = line.split("|", 4)
        for asked in {whole, job} & found.keys():
            found[asked].append(JobState(job, state, nodes, "" if reason == "None" else reason))
    for job in [job for job, known in found.items() if not known]:
        found[job] = [JobState(job, _accounted(job))]
    return found


def alive(jobs: list[str]) -> list[str]:
    """Those of them that run, or will by themselves. Raises QueueError."""
    return [job for job, known in states(jobs).items() if any(state.alive for state in known)]


def show(job: str) -> dict[str, str]:
    """What the controller knows of a job, empty where it has forgotten it. Raises QueueError."""
    text = _ask("scontrol", "--oneliner", "show", "job", job)
    return dict(re.findall(r"(\S+?)=(\S*)", text.splitlines()[0])) if text else {}


def kill_wait() -> float:
    """Seconds between SIGTERM and SIGKILL on this cluster."""
    match = re.search(r"^KillWait\s*=\s*(\d+)", _ask("scontrol", "show", "config"), re.MULTILINE)
    return float(match[1]) if match else 30.0


def grace_time(partition: str) -> float:
    """Seconds that a partition gives to jobs that it preempts."""
    match = re.search(r"GraceTime=(\d+)", _ask("scontrol", "--oneliner", "show", "partition", partition))
    return float(match[1]) if match else 0.0


def hostnames(node_list: str) -> list[str]:
    """`gpu[1-2],login` → gpu1, gpu2, login."""
    return _ask("scontrol", "show", "hostnames", node_list).split()


def address_of(node: str) -> str:
    """Where the controller itself reaches a node."""
    match = re.search(r"NodeAddr=(\S+)", _ask("scontrol", "--oneliner", "show", "node", node))
    return match[1] if match else node


def control(*arguments: str) -> None:
    """scontrol, such as `requeue 12`. Raises QueueError."""
    _ask("scontrol", *arguments)


def cancel(*arguments: str) -> None:
    """scancel. Raises QueueError."""
    _ask("scancel", *arguments)


def _accounted(job: str) -> str:
    """The last state that accounting has of a job that the queue has forgotten."""
    try:
        text = _ask("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job}")
    except QueueError:  # no accounting here
        return "GONE"
    words = text.split()
    return words[0] if words and words[0] in ENDED_STATES else "GONE"


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except FileNotFoundError:
        raise QueueError(f"there is no {command[0]} here: run this on a node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise QueueError(f"{command[0]} gave no answer in {_PATIENCE:.0f} seconds: is the controller down?") from None
    problem = done.stderr.strip()
    if done.returncode and "Invalid job id" not in problem:
        raise QueueError(f"{' '.join(command)} failed: {problem or f'status {done.returncode}'}")
    return done.stdout.strip()
