"""Who holds a stage's run directory: one at a time. What a dead one held is taken over, and it may no longer write.

The holder is named in `owner.json`. A rank that writes asks `require` before: ranks of a start that the cluster gave
up, cut off from it but still running, find another name there and end.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.slurm import scheduler
from launch.slurm.attempt import TOKEN, Attempt
from models.atomic_write import write_whole

_FILE = "owner.json"
_SILENCE = 900.0  # seconds without a word in status.json, after which a holder on a machine out of sight counts as dead


class Superseded(RuntimeError):
    """Another start of the run has taken over."""


@dataclass(frozen=True)
class Owner:
    """Who holds a run directory."""

    token: str
    host: str
    pid: int
    born: str
    """When the process of that number was started, in the kernel's own unit."""
    job: str = ""
    """SLURM's number, empty for a run by hand."""
    restart: int = 0

    @property
    def told(self) -> str:
        """For people."""
        return f"job {self.job}" if self.job else f"process {self.pid} on {self.host}"


def by_hand() -> Owner:
    """This process."""
    host, pid = socket.gethostname(), os.getpid()
    return Owner(f"{host}_{pid}_{_born(pid)}", host, pid, _born(pid))


def by_job(attempt: Attempt) -> Owner:
    """A start of a job."""
    return Owner(attempt.token, socket.gethostname(), os.getpid(), "", attempt.job, attempt.restart)


def take(folder: Path, owner: Owner) -> None:
    """Hold a stage's directory from now on, for this process and those that it starts.

    Raises:
        ValueError: a living process or job holds it.
    """
    held = holder(folder)
    if held is not None and not _same(held, owner) and lives(held, folder):
        raise ValueError(
            f"{folder} is held by {held.told}, which is alive: wait for it, or end it"
            + (f" with `scancel {held.job}`" if held.job else "")
        )
    write_whole(folder / _FILE, json.dumps(asdict(owner), indent=1))
    os.environ[TOKEN] = owner.token


def holder(folder: Path) -> Owner | None:
    """Who holds it; None if nobody does."""
    try:
        return Owner(**json.loads((folder / _FILE).read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ValueError(f"{folder / _FILE} is damaged: remove it, if nothing trains there") from None


def release(folder: Path, token: str) -> None:
    """Hold it no longer, if it is still held by that one."""
    held = holder(folder)
    if held is not None and held.token == token:
        (folder / _FILE).unlink(missing_ok=True)


def require(folder: Path) -> None:
    """Raise Superseded if this process's run is no longer the one that holds the directory."""
    held = holder(folder)
    if held is None or held.token != os.environ.get(TOKEN):
        raise Superseded(f"{folder} was taken over by {held.told if held else 'nobody known'}: nothing more is written")


def _same(held: Owner, newcomer: Owner) -> bool:
    """Whether it is the newcomer itself, or an earlier start of its job."""
    earlier = bool(held.job) and held.job == newcomer.job and held.restart < newcomer.restart
    return held.token == newcomer.token or earlier


def lives(held: Owner, folder: Path) -> bool:
    """Whether a holder is alive, as far as can be told from here."""
    if held.job:
        try:
            return bool(scheduler.alive([held.job]))
        except scheduler.QueueError:  # away from the cluster
            return _spoke_lately(folder)
    if held.host == socket.gethostname():
        return _born(held.pid) == held.born
    return _spoke_lately(folder)


def _spoke_lately(folder: Path) -> bool:
    times = [path.stat().st_mtime for path in (folder / "status.json", folder / _FILE) if path.exists()]
    return time.time() - max(times, default=0.0) < _SILENCE


def _born(pid: int) -> str:
    """Empty where there is no such process, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
