"""Finds the codecs that runs have exported."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def find_exports(runs: Path, passed_over: Callable[[OSError], None]) -> list[Path]:
    """Return all `export/` folders of codecs below a folder, sorted. Links to folders are followed, once each.

    `passed_over` is called with the error of each folder that is there and can't be listed.
    """

    def report(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            passed_over(error)

    found, seen = [], set()
    for parent, folders, names in os.walk(runs, onerror=report, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        if "codec.json" in names and Path(parent).name == "export":
            found.append(Path(parent))
    return sorted(found)
