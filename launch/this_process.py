"""What tells this process from all others: host, boot, pid namespace, pid and start time. A pid alone does not."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from models.processes import stat_fields


def boot() -> str:
    """Return the id of this machine's boot, which all its containers share; empty if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def booted_at() -> float:
    """Return when this machine booted, in seconds since the epoch; 0 if the system does not say it."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith("btime ")), 0.0)


def pid_namespace() -> str:
    """Return the namespace in which this process has its pid: containers have their own. Empty if unknown."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def born(pid: int) -> str:
    """Return the start time of a process in kernel ticks; empty if there is no such process or it is a zombie."""
    fields = stat_fields(pid)
    return "" if not fields or fields[0] == "Z" else fields[19]


def command() -> str:
    """Return the command line of this process, for people."""
    program = Path(sys.argv[0])
    name = "spresso" if program.name in ("spresso", "cli.py") else program.name
    return shlex.join([name, *sys.argv[1:]])


def launch() -> tuple[str, int]:
    """Return the id of the SLURM job or torchrun that started this process, and how often it was restarted before.

    The id is empty if there is none. A launcher ends the ranks of its earlier starts, so a later start may take over.
    """
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"SLURM job {job}", int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return ("", 0) if run == "none" else (f"torchrun {run}", int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
