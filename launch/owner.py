"""Ownership of a stage's directory. One process or job owns it; a new one takes over from an owner that is dead.

The owner is named in `owner.json`. A rank calls `require` before it writes. Ranks of an earlier start that the cluster
has given up, but that still run on a node cut off from it, find another owner there and end.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from launch.slurm import scheduler
from launch.slurm.attempt import TOKEN, Attempt
from models.documents import Natural, Positive, read_json, write_json

_FILE = "owner.json"
_SILENCE = 900.0  # seconds without a new status.json after which an owner on another machine counts as dead


class Superseded(RuntimeError):
    """Another start of the run has taken over."""


@dataclass(frozen=True)
class Owner:
    """Owner of a stage's directory."""

    token: str
    host: str
    pid: Positive
    born: str
    """Start time of the process in kernel ticks, which tells it from a later process with the same pid."""
    job: str = ""
    """SLURM's job id; empty for a run without SLURM."""
    restart: Natural = 0

    @property
    def told(self) -> str:
        """Name of the owner, for people."""
        return f"job {self.job}" if self.job else f"process {self.pid} on {self.host}"


def by_hand() -> Owner:
    """Return this process as an owner."""
    host, pid = socket.gethostname(), os.getpid()
    return Owner(f"{host}_{pid}_{_born(pid)}", host, pid, _born(pid))


def by_job(attempt: Attempt) -> Owner:
    """Return a start of a job as an owner."""
    return Owner(attempt.token, socket.gethostname(), os.getpid(), "", attempt.job, attempt.restart)


def take(folder: Path, owner: Owner) -> None:
    """Make `owner` the owner of a stage's directory, for this process and its children.

    Raises:
        ValueError: a living process or job owns the directory.
    """
    held = holder(folder)
    if held is not None and not _same(held, owner) and lives(held, folder):
        raise ValueError(
            f"{folder} is in use by {held.told}, which is alive: wait for it, or end it"
            + (f" with `scancel {held.job}`" if held.job else "")
        )
    write_json(folder / _FILE, owner, indent=1)
    os.environ[TOKEN] = owner.token


def holder(folder: Path) -> Owner | None:
    """Return the owner of a stage's directory; None if it has none. Raises ValueError if the file is damaged."""
    try:
        return read_json(folder / _FILE, Owner, mend="remove it if nothing trains there")
    except FileNotFoundError:
        return None


def release(folder: Path, token: str) -> None:
    """Give up the ownership of a directory, if the owner with this token still has it."""
    held = holder(folder)
    if held is not None and held.token == token:
        (folder / _FILE).unlink(missing_ok=True)


def require(folder: Path) -> None:
    """Raise Superseded if the start that this process belongs to no longer owns the directory."""
    held = holder(folder)
    if held is None or held.token != os.environ.get(TOKEN):
        raise Superseded(f"{folder} was taken over by {held.told if held else 'an unknown owner'}: this rank ends")


def _same(held: Owner, newcomer: Owner) -> bool:
    """Whether the owner is the newcomer itself, or an earlier start of the newcomer's job."""
    earlier = bool(held.job) and held.job == newcomer.job and held.restart < newcomer.restart
    return held.token == newcomer.token or earlier


def lives(held: Owner, folder: Path) -> bool:
    """Whether an owner is alive. If that cannot be checked, an owner that wrote recently counts as alive."""
    if held.job:
        try:
            return bool(scheduler.alive([held.job]))
        except scheduler.QueueError:  # there is no SLURM on this machine, or no answer
            return _wrote_recently(folder)
    if held.host == socket.gethostname():
        return _born(held.pid) == held.born
    return _wrote_recently(folder)


def _wrote_recently(folder: Path) -> bool:
    times = [path.stat().st_mtime for path in (folder / "status.json", folder / _FILE) if path.exists()]
    return time.time() - max(times, default=0.0) < _SILENCE


def _born(pid: int) -> str:
    """Return the start time of a process in kernel ticks; empty if there is no such process or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
