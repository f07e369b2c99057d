"""What a run was made with: Python, packages, and the version of this code."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

COPIED_FROM = "COPIED_FROM"
"""Beside code that was set aside for a job: the commit that it was, and its changes."""


_ROOT = Path(__file__).resolve().parents[1]


def environment() -> str:
    """Python, packages, git commit and uncommitted changes."""
    packages = sorted({f"{item.metadata['Name']}=={item.version}" for item in distributions()}, key=str.lower)
    return "\n".join([f"python {sys.version}", f"commit {code_version()}", *packages, "", local_changes()])


def code_version() -> str:
    """The git commit of this code, or `unknown` where it was installed without one."""
    return _copied().partition("\n")[0] or _git("rev-parse", "HEAD") or "unknown"


def local_changes() -> str:
    """What of this code is not committed, as a diff."""
    return _copied().partition("\n")[2] or _git("diff", "HEAD")


def _copied() -> str:
    """Of code that was set aside for a job: commit and changes of the checkout that it was copied from."""
    path = _ROOT / COPIED_FROM
    return path.read_text("utf-8") if path.exists() else ""


def _git(*arguments: str) -> str:
    if not (_ROOT / ".git").exists():
        return ""
    try:
        return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
