"""Copies checkpoints and exports from a store: whole or not there, in as many bytes as announced, resumed if cut off.

A copy grows in a folder of its own, and is moved to its place once all its checksums are right. What a kill left of it
is kept: the next start fetches the rest.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

from models.atomic_write import sync
from trainer.checkpoints.manifest import LARGEST_MANIFEST, OtherFormatError, read_manifest
from trainer.checkpoints.names import MANIFEST
from trainer.checkpoints.problems import find_problems
from trainer.data.remote import MissingFileError
from trainer.files import file_digest
from trainer.formatting import size
from trainer.stores.store import Store

logger = logging.getLogger(__name__)

_AT_ONCE = 4  # files


class DamagedCopyError(ValueError):
    """What the store holds is damaged: another try would fetch the same."""


def copy_checkpoint(store: Store, where: str, into: Path) -> None:
    """Copy a checkpoint into a folder, which may hold a part of it.

    Args:
        store: where it lies.
        where: its folder there.
        into: the folder to fill.

    Raises:
        DamagedCopyError: it has no manifest, or is not what its manifest says.
        OtherFormatError: another version of the program wrote it.
        ValueError: the store gives no answer, or denies it; or the disk has too little room.
    """
    into.mkdir(parents=True, exist_ok=True)
    try:
        manifest = store.content(f"{where}/{MANIFEST}", most=LARGEST_MANIFEST)
    except MissingFileError as error:
        raise DamagedCopyError(str(error)) from None
    if (into / MANIFEST).exists() and (into / MANIFEST).read_bytes() != manifest:
        shutil.rmtree(into)
        into.mkdir()
    (into / MANIFEST).write_bytes(manifest)
    try:
        files = read_manifest(into)["files"]
    except OtherFormatError:
        raise
    except ValueError as error:
        raise DamagedCopyError(str(error)) from None
    copy_files(store, where, into, files)
    if problems := find_problems(into, checksums=False):
        raise DamagedCopyError("; ".join(problems))


def copy_files(store: Store, where: str, into: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Copy files from a folder of a store into one here; name → `bytes` and, where it is known, `sha256`.

    Raises as `copy_checkpoint` does.
    """
    for name in files:
        require_below(name)
    _require_room(into, files)

    def copy(name: str) -> None:
        _copy(store, f"{where}/{name}", into / name, files[name])

    with ThreadPoolExecutor(_AT_ONCE, "fetch") as pool:
        for _ in pool.map(copy, files):  # raises the first error
            pass
    sync(into)


def require_below(name: str) -> None:
    """Raise DamagedCopyError unless a name from a store leads to a place below the folder that it is put into."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise DamagedCopyError(f"{name!a} is not the name of a file of a run")


def _require_room(into: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    there = sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
    needed, free = sum(entry["bytes"] for entry in files.values()) - there, shutil.disk_usage(into).free
    if needed > free:
        raise ValueError(
            f"{into} has {size(free)} free, but what is fetched needs {size(needed)}: free some space, or set another "
            f"run_dir"
        )


def _copy(store: Store, name: str, path: Path, facts: Mapping[str, Any]) -> None:
    """Fetch a file, or the rest of it. A file whose checksum is wrong is fetched a second time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        try:
            with FileIO(str(path), "ab") as file:
                if file.seek(0, os.SEEK_END) > facts["bytes"]:
                    file.truncate(0)
                store.append(name, file, facts["bytes"])
        except MissingFileError as error:
            raise DamagedCopyError(str(error)) from None
        if "sha256" not in facts or file_digest(path) == facts["sha256"]:
            sync(path)
            return
        path.unlink()
    raise DamagedCopyError(f"{store.url}/{name} has a wrong checksum")
