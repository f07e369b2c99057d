"""Finds the runs in a folder, one level deeper, and in sweeps. Symbolic links that lead out are not followed."""

from __future__ import annotations

import os
from pathlib import Path

from launch.status.stage_status import StageStatus
from launch.sweep.record import POINTS, SHARED, is_sweep
from models.readable import describe_os_error
from trainer.stages import STAGES

MOST = 10_000
"""Runs that are shown; a folder with more is not one of runs."""


def found_runs(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the runs in a folder by name, such as `demo` or `rates/points/lr=1e-4`, and what was left out and why.

    Args:
        folder: the folder, resolved.
    """
    found: dict[str, Path] = {}
    problems: list[str] = []
    for name, path in _folders(folder, folder, problems):
        if _is_run(path):
            found[name] = path
        else:
            for below in (POINTS, SHARED) if is_sweep(path) else ("",):
                inner = _folders(folder, path / below, problems)
                found |= {f"{Path(name, below, own)}": each for own, each in inner if _is_run(each)}
        if len(found) > MOST:
            problems.append(f"{folder} has more than {MOST} runs; the others are left out")
            break
    return found, problems


def _folders(root: Path, folder: Path, problems: list[str]) -> list[tuple[str, Path]]:
    """Return the names and paths of the folders in a folder, sorted."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))
    except OSError as error:
        problems.append(f"{folder} can't be read: {describe_os_error(error)}")
        return []
    found = []
    for name in names:
        path = folder / name
        if path.is_symlink() and not _is_inside(path, root):
            problems.append(f"{path} leads out of {root} and is left out: serve the folder that it leads to")
        else:
            found.append((name, path))
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _is_inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a link that was changed just now
        return False


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run; one that can't be read now is, and says so where the run is shown."""
    try:
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries}
        return "jobs.jsonl" in names or any(StageStatus(folder / name, None).begun for name in STAGES if name in names)
    except OSError:
        return True
