"""Finds the codecs that runs have exported."""

from __future__ import annotations

import os
from pathlib import Path


def find_exports(runs: Path) -> list[Path]:
    """Return all `export/` folders of codecs below a folder, sorted. Links to folders are followed, once each."""
    found, seen = [], set()
    for parent, folders, names in os.walk(runs, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        if "codec.json" in names and Path(parent).name == "export":
            found.append(Path(parent))
    return sorted(found)
