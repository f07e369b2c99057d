"""What Linux says of a process. Other systems have no /proc, and nothing is known there."""

from __future__ import annotations

from pathlib import Path


def stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name: the state first, the start time in ticks as the 20th.

    Empty if there is no such process, or no /proc.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
