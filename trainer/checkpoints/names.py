"""Names of checkpoint folders: `step_` and the samples seen. This module does not import torch."""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
TEMPORARY = "tmp_"
"""Beginning of the name of a checkpoint that is being written or deleted."""
_NAME = re.compile(r"step_(\d{12,})")
_LEFTOVER = re.compile(TEMPORARY + r"(old_)?step_\d{12,}_[0-9a-f]{8}")


def folder_name(samples: int) -> str:
    """Return the name of the checkpoint after `samples` samples; names sort in numerical order."""
    return f"step_{samples:012d}"


def samples_of(path: Path) -> int:
    """Return the number of samples seen, from a checkpoint's path."""
    return samples_of_name(path.name)


def samples_of_name(name: str) -> int:
    """Return the number of samples seen, from a checkpoint's name."""
    return int(name.removeprefix("step_"))


def is_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint."""
    return _NAME.fullmatch(name) is not None


def checkpoints(directory: Path) -> list[Path]:
    """List the checkpoints in a directory by samples seen, without checking whether they are damaged.

    Raises:
        OSError: the directory can't be read now.
    """
    try:
        names = [path for path in directory.iterdir() if is_name(path.name)]
    except FileNotFoundError:
        if directory.is_symlink():  # its disk may be away, and then nobody knows what it holds
            raise
        return []
    except NotADirectoryError:
        return []
    return sorted(names, key=samples_of)


def leftovers(directory: Path) -> list[Path]:
    """List what killed saves and deletions left in a directory; folders that others named `tmp_…` are not among it."""
    return [path for path in directory.glob(f"{TEMPORARY}*") if _LEFTOVER.fullmatch(path.name)]
