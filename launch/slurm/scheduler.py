"""Queries and controls SLURM. The queue is asked first, because accounting lags and not every cluster has it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

_PATIENCE = 20.0  # seconds; a command retries for nine seconds if the controller is down
ENDED_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT"),
}
"""States in the queue of a job that does not return by itself. In accounting, a requeued job can have them too."""


class QueueError(OSError):
    """SLURM gave no answer."""


@dataclass(frozen=True)
class JobState:
    """Current state of a job, or of one element of an array."""

    job: str
    """Job id; `12_3` for an element of an array."""
    state: str
    """State in squeue: PENDING, RUNNING, COMPLETING …; GONE if SLURM no longer knows the job."""
    nodes: str = ""
    """Nodes of the job, in SLURM's notation."""
    reason: str = ""
    """Why the job waits; empty if it does not."""

    @property
    def alive(self) -> bool:
        """Whether the job runs, or will run by itself."""
        return self.state not in ENDED_STATES and self.state != "GONE"


def states(jobs: list[str]) -> dict[str, list[JobState]]:
    """Return the states of jobs by job id; an array has several, one element of it (`12_3`) has one.

    Raises:
        QueueError: this machine has no SLURM, or its controller does not answer.
    """
    if not jobs:
        return {}
    found: dict[str, list[JobState]] = {job: [] for job in jobs}
    each = ["--array"] if any("_" in job for job in jobs) else []  # without it, a long list of elements is cut short
    command = ["squeue", "--noheader", "--all", "--states=all", *each, "--format=%F|%i|%T|%N|%r"]
    text = _ask(*command, f"--jobs={','.join(jobs)}")
    for line in text.splitlines():
        whole, job, state, nodes, reason = line.split("|", 4)
        elements = {f"{whole}_{number}" for number in elements_of(job)}
        for asked in {whole, job, *elements} & found.keys():
            found[asked].append(JobState(job, state, nodes, "" if reason == "None" else reason))
    forgotten = _accounted([job for job, known in found.items() if not known])
    return found | {job: [JobState(job, state)] for job, state in forgotten.items()}


def elements_of(job: str) -> list[str]:
    """Expand the parts in a job id: `12_[0-2,7%4]` → 0, 1, 2, 7; `12_3` → 3; `12` → none."""
    found = []
    for word in job.partition("_")[2].strip("[]").partition("%")[0].split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", word):
            found += [str(number) for number in range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))]
    return found


def alive(jobs: list[str]) -> list[str]:
    """Return the jobs that run, or will run by themselves. Raises QueueError."""
    return [job for job, known in states(jobs).items() if any(state.alive for state in known)]


def show(job: str) -> dict[str, str]:
    """Return what the controller knows about a job; empty if it has forgotten the job. Raises QueueError."""
    text = _ask("scontrol", "--oneliner", "show", "job", job)
    return dict(re.findall(r"(\S+?)=(\S*)", text.splitlines()[0])) if text else {}


def kill_wait() -> float:
    """Return the seconds between SIGTERM and SIGKILL on this cluster. Raises QueueError."""
    match = re.search(r"^KillWait\s*=\s*(\d+)", _ask("scontrol", "show", "config"), re.MULTILINE)
    return float(match[1]) if match else 30.0


def grace_time(partition: str) -> float:
    """Return the grace period in seconds of jobs that a partition preempts. Raises QueueError."""
    match = re.search(r"GraceTime=(\d+)", _ask("scontrol", "--oneliner", "show", "partition", partition))
    return float(match[1]) if match else 0.0


def hostnames(node_list: str) -> list[str]:
    """Expand a list of nodes: `gpu[1-2],login` → gpu1, gpu2, login. Raises QueueError."""
    return _ask("scontrol", "show", "hostnames", node_list).split()


def address_of(node: str) -> str:
    """Return the address at which the controller reaches a node. Raises QueueError."""
    match = re.search(r"NodeAddr=(\S+)", _ask("scontrol", "--oneliner", "show", "node", node))
    return match[1] if match else node


def control(*arguments: str) -> None:
    """Run scontrol, with arguments such as `requeue 12`. Raises QueueError."""
    _ask("scontrol", *arguments)


def cancel(*arguments: str) -> None:
    """Run scancel. Raises QueueError."""
    _ask("scancel", *arguments)


def _accounted(jobs: list[str]) -> dict[str, str]:
    """Return the states in accounting of jobs that the queue has forgotten; GONE for one that is not there.

    One query is enough for hundreds of jobs. Of an array, the first element counts.
    """
    if not jobs:
        return {}
    try:
        columns = ["--noheader", "--allocations", "--parsable2", "--format=JobID,State"]
        text = _ask("sacct", *columns, f"--jobs={','.join(jobs)}")
    except QueueError:  # the cluster has no accounting
        text = ""
    known: dict[str, str] = {}
    for line in text.splitlines():
        job, _, state = line.partition("|")
        for name in (job, job.partition("_")[0]):
            known.setdefault(name, state.partition(" ")[0])  # the state is `CANCELLED by 1000`
    return {job: state if (state := known.get(job, "")) in ENDED_STATES else "GONE" for job in jobs}


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except FileNotFoundError:
        raise QueueError(f"{command[0]} is not installed here: run this command on a node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise QueueError(f"{command[0]} gave no answer in {_PATIENCE:.0f} seconds: is the controller down?") from None
    problem = done.stderr.strip()
    if done.returncode and "Invalid job id" not in problem:
        raise QueueError(f"{' '.join(command)} failed: {problem or f'status {done.returncode}'}")
    return done.stdout.strip()
