"""Whether a checkpoint on the disk is complete and undamaged, and what is wrong with one that is not."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.disk_errors import NO_FILE
from models.readable import describe_os_error, is_broken_link
from trainer.checkpoints.manifest import read_manifest, uncovered
from trainer.checkpoints.rank_file import RankFile
from trainer.files import file_digest


def find_problems(path: Path, *, checksums: bool = True) -> list[str]:
    """Return the problems of a checkpoint; empty if it is complete and undamaged.

    Reads every file to compare its checksum and its header, or without `checksums` only compares file sizes.

    Raises:
        OSError: the checkpoint can't be read now, for example because the disk failed, access to it is refused, or the
            process has too many open files. That is no sign of damage.
    """
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return [str(error)]
    return problems_beside(path, manifest, checksums=checksums)


def problems_beside(path: Path, manifest: Mapping[str, Any], *, checksums: bool) -> list[str]:
    """Return the problems of a checkpoint whose manifest has been read, as `find_problems` does."""
    files = manifest["files"]
    unknown = [f"{file.name} is not in the manifest" for file in path.glob("*.safetensors") if file.name not in files]
    known = [_file_problem(path / name, expected, checksums=checksums) for name, expected in files.items()]
    return unknown + uncovered(manifest) + [problem for problem in known if problem]


def header_problem(file: Path, ranges: Mapping[str, list[int]]) -> str | None:
    """Return how the tensors in a file differ from the manifest's ranges; None if they don't."""
    try:
        with file.open("rb", buffering=0) as opened:
            RankFile(opened, ranges)
    except ValueError as error:
        return str(error)
    return None


def _file_problem(file: Path, expected: Mapping[str, Any], *, checksums: bool) -> str | None:
    try:
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"{file.name} has {size} bytes, not {expected['bytes']}"
        if checksums and file_digest(file) != expected["sha256"]:
            return f"{file.name} has a wrong checksum"
        return header_problem(file, expected["ranges"]) if checksums else None
    except OSError as error:
        if error.errno in NO_FILE and not is_broken_link(file):
            return f"{file.name} is missing" if error.errno == errno.ENOENT else describe_os_error(error)
        raise
