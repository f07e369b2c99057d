"""`spresso index`: makes the index of existing tars, and verifies an index against its tars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.disk_errors import patiently
from models.documents import LARGEST_LIST, read_json
from models.readable import describe_os_error
from trainer.data.index_file import open_mapped
from trainer.data.index_row import INDEX_ROWS, OLDER_INDEX_ROWS
from trainer.data.shard_set import ShardSet
from trainer.data.shards import MAKE_AGAIN, SetInfo, find_members, index_rows, text_width, write_index
from trainer.data.tar_members import is_apple_double, shown
from trainer.data.workers import exit_with_parent, explain_dead_workers

Result = TypeVar("Result")
ProgressCallback = Callable[[int, int], None]
"""A function that is called with the shards done and the number of shards."""


def index_folder(
    folder: Path, info: SetInfo, *, workers: int = 1, progress: ProgressCallback | None = None
) -> ShardSet:
    """Make a folder of tars a set. Its shards are the tars in the order of their names, as `scan_shard` reads them.

    Args:
        folder: holds uncompressed `*.tar`, written by `spresso prepare`, WebDataset's `TarWriter` or `tar`.
        info: the facts that all samples share.
        workers: processes that read the tars.
        progress: called after each tar.

    Raises:
        ValueError: there is no tar, a tar is broken or holds no latents, two tars hold the same key, or a worker died.
    """
    paths = _tars(folder)
    shards: dict[str, NDArray[np.void]] = {}
    shard_of: dict[str, str] = {}
    for done, (path, (rows, keys)) in enumerate(zip(paths, _in_workers(_scan, paths, workers), strict=True), 1):
        if not keys:
            raise ValueError(f"{path} holds no sample: remove the tar, or give a folder with tars of latents")
        for key in keys:
            if key in shard_of:
                raise ValueError(
                    f"the key {shown(key)} is in both {shard_of[key]} and {path.name}: rename or remove one sample"
                )
            shard_of[key] = path.name
        shards[path.name] = rows
        if progress:
            progress(done, len(paths))
    write_index(folder, _with_text(info, paths, shards), shards)
    return ShardSet(folder)


def _with_text(info: SetInfo, paths: list[Path], shards: dict[str, NDArray[np.void]]) -> SetInfo:
    """Return `info` with a `text` that fits the shards; `encoder` is "unknown" if `info` did not fit them."""
    if not all("text_tokens" in (rows.dtype.names or ()) for rows in shards.values()):
        return replace(info, text=None)
    width = next((found for found in map(text_width, paths) if found is not None), 0)
    if info.text is not None and info.text["width"] == width:
        return info
    tokens = max(int(rows["text_tokens"].max()) for rows in shards.values())
    return replace(info, text={"encoder": "unknown", "tokens": tokens, "width": width})


def verify_folder(folder: Path, *, workers: int = 1, progress: ProgressCallback | None = None) -> list[str]:
    """Read a whole set and return its differences from its index, one line each; an empty list if there are none.

    Raises:
        ValueError: the folder is not a set, or a worker died.
    """
    shard_set = ShardSet(folder, verify=False)
    problems = []
    strays = {path.name for path in _tars_in(folder)} - {path.name for path in shard_set.paths}
    if strays:
        problems.append(f"not in the index: {', '.join(sorted(strays))}; run `spresso index {folder}`")
    if not shard_set.has_own_index():
        problems.append(f"index.npy is damaged: run `spresso index {folder}`")
    scans = _in_workers(_scan_tolerantly, shard_set.paths, workers)
    for number, (path, found) in enumerate(zip(shard_set.paths, scans, strict=True)):
        expected = np.sort(shard_set.index[shard_set.index["shard"] == number], order="x0_offset")
        if isinstance(found, str):
            problems.append(found)
        else:
            problems += _differences(path, expected, np.sort(found[0], order="x0_offset"))
        if progress:
            progress(number + 1, len(shard_set.paths))
    return problems


def _differences(path: Path, expected: NDArray[np.void], found: NDArray[np.void]) -> list[str]:
    if len(found) != len(expected):
        return [f"{path} holds {len(found)} samples, but its index says {len(expected)}"]
    names = [name for name in expected.dtype.names or () if name != "shard"]
    if not set(names) <= set(found.dtype.names or ()):
        return [f"{path} lacks audio or text that its index says it holds"]
    wrong = np.zeros(len(expected), bool)
    for name in names:
        wrong |= expected[name] != found[name]
    return [f"{path} at byte {row['x0_offset']}: the sample is not the one in the index" for row in expected[wrong]]


def _tars(folder: Path) -> list[Path]:
    paths = _tars_in(folder)
    if not paths:
        compressed = [path.name for path in folder.glob("*.tar.*")]
        hint = f"; {compressed[0]} is compressed, which rules out random access: unpack it" if compressed else ""
        raise ValueError(f"{folder} holds no .tar{hint}")
    return paths


def _tars_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not is_apple_double(path))


def _in_workers(scan: Callable[[Path], Result], paths: list[Path], workers: int) -> Iterator[Result]:
    if workers == 1 or len(paths) < 2:
        yield from map(scan, paths)
        return
    pool = ProcessPoolExecutor(min(workers, len(paths)), get_context("forkserver"), exit_with_parent)
    with pool, explain_dead_workers():
        yield from pool.map(scan, paths)


def _scan(path: Path) -> tuple[NDArray[np.void], list[str]]:
    samples = patiently(lambda: find_members(path))
    return patiently(lambda: index_rows(path, samples)), list(samples)


def _scan_tolerantly(path: Path) -> tuple[NDArray[np.void], list[str]] | str:
    try:
        return _scan(path)
    except OSError as error:
        return f"{describe_os_error(error)}: it can't be read now, which is no sign of damage"
    except ValueError as error:
        return str(error)


def require_own_index(folder: Path) -> None:
    """Raise ValueError if the folder holds an index.npy or a set.json that is of no set, which an index would replace.

    The index.npy is written first, so that it may stand alone after a kill.
    """
    foreign = []
    try:
        if open_mapped(folder / "index.npy").dtype not in (*INDEX_ROWS, *OLDER_INDEX_ROWS):
            foreign.append("index.npy")
    except (OSError, ValueError):  # missing or damaged; then set.json decides
        foreign += ["index.npy"] if (folder / "index.npy").exists() and not (folder / "set.json").exists() else []
    try:
        description = read_json(folder / "set.json", dict[str, Any], mend=MAKE_AGAIN, most=LARGEST_LIST)
        ours = {"version", "shards"} <= description.keys()
    except FileNotFoundError:
        ours = True
    except ValueError:
        ours = False
    if foreign := [*foreign, *([] if ours else ["set.json"])]:
        raise ValueError(f"{folder / foreign[0]} is no index of latents, or a damaged one: move it away, then repeat")
