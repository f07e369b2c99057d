"""Records what a run was made with: Python, packages, and the version of this code."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

COPIED_FROM = "COPIED_FROM"
"""File next to code that was copied for a cluster job: the commit that it was copied from, then uncommitted changes."""


_ROOT = Path(__file__).resolve().parents[1]


def environment() -> str:
    """Describe the Python version, packages, git commit and uncommitted changes."""
    packages = sorted({f"{item.metadata['Name']}=={item.version}" for item in distributions()}, key=str.lower)
    return "\n".join([f"python {sys.version}", f"commit {code_version()}", *packages, "", local_changes()])


def code_version() -> str:
    """Return the git commit of this code; `unknown` if it was installed without git."""
    return _copied().partition("\n")[0] or _git("rev-parse", "HEAD") or "unknown"


def local_changes() -> str:
    """Return the uncommitted changes of this code as a diff."""
    return _copied().partition("\n")[2] or _git("diff", "HEAD")


def _copied() -> str:
    """Read the commit and changes of the checkout that this code was copied from; empty if it is no copy."""
    path = _ROOT / COPIED_FROM
    return path.read_text("utf-8") if path.exists() else ""


def _git(*arguments: str) -> str:
    if not (_ROOT / ".git").exists():
        return ""
    try:
        return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
