"""How a checkpoint's folder is named: `step_` and the samples seen. Importing this module needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{12,})")


def folder_name(samples: int) -> str:
    """The name of the checkpoint after so many samples; names sort as their numbers do."""
    return f"step_{samples:012d}"


def samples_of(path: Path) -> int:
    """The samples seen that a checkpoint's name tells."""
    return int(path.name.removeprefix("step_"))


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, damaged ones too, by samples seen."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=samples_of)
