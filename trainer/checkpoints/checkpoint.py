"""Sharded checkpoints: any number of ranks saves one, and any other number of ranks loads it.

A checkpoint is a directory `step_{samples seen}` with one safetensors file per rank and a `manifest.json`. Every tensor
is stored in float32 under its plain name as flat one-dimensional ranges: each rank writes the range of the flattened
tensor that it owns, and a load reads any range, whichever ranks wrote it. Checkpoints contain no pickled data.

The files have the layout of `torch.distributed.checkpoint.HuggingFaceStorageWriter(save_distributed=True)`, and torch's
reader for that layout can read them. This module does not use torch's writer because that writer takes twice the memory
and several times as long, and silently drops all but one of a rank's ranges of a tensor.

A checkpoint is written under a temporary name, and renamed once every rank has written its file and the manifest is
complete. A directory named `step_…` was therefore complete when it was written, and the manifest's checksums show
whether it still is.

"All ranks" marks the functions that all ranks must call together. Without a process group there is one rank.
"""

from __future__ import annotations

import errno
import json
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from models.atomic_write import sync
from models.disk_errors import NO_FILE, mend_words, room_words, with_number
from models.readable import describe_os_error, is_broken_link
from models.weights import write_safetensors
from trainer.checkpoints.cover import check_cover
from trainer.checkpoints.manifest import (
    CHECKPOINT_FORMAT,
    OtherFormatError,
    misfits,
    read_manifest,
    signed,
    uncovered,
)
from trainer.checkpoints.names import MANIFEST, TEMPORARY, checkpoints, folder_name, leftovers, samples_of
from trainer.checkpoints.rank_file import RankFile
from trainer.files import file_digest
from trainer.ranks import collective
from trainer.ranks.collective import shortened
from trainer.ranks.flat_ranges import FlatRange

Wanted = Callable[[dict[str, Any]], bool]

logger = logging.getLogger(__name__)


class NoWholeCheckpointError(ValueError):
    """There are checkpoints, and all of them are damaged."""


def save(
    directory: Path,
    samples: int,
    tensors: Mapping[str, FlatRange],
    meta: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    require_ownership: Callable[[], None] = lambda: None,
) -> Path:
    """Writes `directory/step_{samples}`, replacing a checkpoint of that name. All ranks.

    The tensors must not change during the call: `saver.Saver` passes a copy of them, so that training can continue.

    Args:
        directory: the folder of the run's checkpoints; created if it does not exist.
        samples: samples seen.
        tensors: this rank's range of every tensor, in host memory; empty if it owns nothing of the tensor. Every rank
            passes the same names.
        meta: JSON-serializable metadata of the run (hashes, code version, …). Rank 0's is stored, with `samples`,
            `time` (seconds since 1970) and `world_size` added.
        group: see `collective`.
        require_ownership: called on rank 0 before it writes; raises if a later start of this run has taken over.

    Returns:
        The checkpoint's path, once the checkpoint is complete.

    Raises:
        OSError: on every rank, if any rank could not write. Older checkpoints are then untouched.
        ValueError: on every rank, if the ranks' ranges do not cover every element of every tensor exactly once.
    """
    check_cover(tensors, group)
    final = directory / folder_name(samples)
    temporary = directory / collective.on_rank_0(lambda: f"{TEMPORARY}{final.name}_{secrets.token_hex(4)}", group)
    try:
        collective.on_rank_0(lambda: _begin(temporary, require_ownership), group)
        written = collective.together(lambda: _write(temporary, tensors), group)
        manifest = {
            "format": CHECKPOINT_FORMAT,
            "meta": {**meta, "samples": samples, "time": round(time.time()), "world_size": len(written)},
            "tensors": {name: list(owned.shape) for name, owned in tensors.items()},
            "files": {name: entry for rank_files in written for name, entry in rank_files.items()},
        }
        collective.on_rank_0(lambda: _commit(temporary, final, manifest, require_ownership), group)
    except OSError as error:
        if collective.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if full := room_words(error.errno):
            raise OSError(error.errno, full, str(final)) from error
        mended_by = f" ({mend})" if (mend := mend_words(error.errno)) else ""
        message = f"could not save {final}: {error}{mended_by}. Older checkpoints are untouched"
        raise with_number(error.errno, message) from error
    return final


def load(path: Path, tensors: Mapping[str, FlatRange], *, partly: bool = False) -> dict[str, Any]:
    """Fills this rank's ranges from a checkpoint and returns its `meta`. All ranks.

    Checks the files' sizes but not their checksums; `newest` and `find_problems` check those.

    Args:
        path: a checkpoint's directory.
        tensors: the range of every tensor that this rank loads; empty if it loads nothing of the tensor.
        partly: whether the checkpoint may contain further tensors.

    Raises:
        ValueError: on every rank, before anything is filled, if the checkpoint is incomplete, if its files do not hold
            every element exactly once, or if the names and shapes of its tensors differ from `tensors`. The message
            names the tensor and the file.
        OSError: on every rank, if any rank could not read. Its `errno` is that of the rank's error.
    """
    of_ranks = collective.together(lambda: _unfit(path, tensors, partly=partly))
    problems = list(dict.fromkeys(problem for rank_problems in of_ranks for problem in rank_problems))
    if problems:
        raise ValueError(f"{path} cannot be loaded: {shortened(problems)}")
    metas = collective.together(lambda: _read(path, tensors))
    return metas[collective.rank()]


def find_problems(path: Path, *, checksums: bool = True) -> list[str]:
    """Returns the problems of a checkpoint; empty if it is complete and undamaged.

    Reads every file to compare its checksum and its header, or without `checksums` only compares file sizes.

    Raises:
        OSError: the checkpoint can't be read now, for example because the disk failed, access to it is refused, or the
            process has too many open files. That is no sign of damage.
    """
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return [str(error)]
    files = manifest["files"]
    unknown = [f"{file.name} is not in the manifest" for file in path.glob("*.safetensors") if file.name not in files]
    known = [_file_problem(path / name, expected, checksums=checksums) for name, expected in files.items()]
    return unknown + uncovered(manifest) + [problem for problem in known if problem]


def newest_on_all_ranks(directory: Path, *, wanted: Wanted = lambda meta: True) -> Path | None:
    """Calls `newest` on rank 0, and returns its result or raises its errors on all ranks. All ranks."""

    def find() -> tuple[Path | None, str]:
        try:
            return newest(directory, wanted=wanted), ""
        except ValueError as error:
            return None, str(error)

    path, problem = collective.on_rank_0(find)
    if problem:
        raise ValueError(problem)
    return path


def newest(directory: Path, *, wanted: Wanted = lambda meta: True) -> Path | None:
    """Returns the newest undamaged checkpoint whose `meta` satisfies `wanted`; None if no checkpoint does.

    If there is an undamaged one, sets aside the damaged ones that it finds.

    Raises:
        NoWholeCheckpointError: there are checkpoints, but all are damaged. They keep their names.
        OtherFormatError: another version of the program wrote a checkpoint. It keeps its name.
        OSError: a checkpoint can't be read now. All keep their names, because it may be whole.
    """
    damaged: dict[Path, list[str]] = {}
    found, whole = None, False
    for path in reversed(checkpoints(directory)):
        if problems := _damage(path):
            damaged[path] = problems
            continue
        whole = True
        if wanted(read_manifest(path)["meta"]):
            found = path
            break
    if damaged and not whole:
        path, problems = next(iter(damaged.items()))
        raise NoWholeCheckpointError(
            f"{directory} holds no whole checkpoint, {len(damaged)} damaged; the newest, {path.name}: "
            f"{shortened(problems)}. Resume from another one with checkpoint.resume=PATH, or begin anew with "
            f"checkpoint.resume=never, which keeps the damaged ones under other names"
        )
    for path, problems in damaged.items():
        _set_aside(path, problems)
    return found


def set_all_aside(directory: Path) -> None:
    """Renames all checkpoints of a directory, which are all damaged, to `damaged_…`, so that a run can begin anew."""
    for path in checkpoints(directory):
        _set_aside(path, find_problems(path))


def _damage(path: Path) -> list[str]:
    """Returns the problems of a checkpoint; raises OtherFormatError if it may be whole for another version."""
    try:
        read_manifest(path)
    except OtherFormatError as error:
        mend = "use the version that wrote it, or resume from another one with checkpoint.resume=PATH"
        raise OtherFormatError(f"{error}: {mend}") from None
    except ValueError:
        pass  # `find_problems` says what is wrong.
    return find_problems(path)


def _set_aside(path: Path, problems: list[str]) -> None:
    """Renames a damaged checkpoint, so that `prune` does not count it; a user may want to recover what it holds."""
    renamed = path.rename(path.with_name(f"damaged_{path.name}_{secrets.token_hex(4)}"))
    logger.warning(
        "DAMAGED CHECKPOINT %s is passed over and renamed to %s: %s", path, renamed.name, shortened(problems)
    )


def prune(directory: Path, *, last: int, best: int = 0, every: int | None = None) -> list[Path]:
    """Deletes checkpoints that are not to be kept, and returns their paths. Does nothing on ranks other than 0.

    Args:
        directory: the folder of the run's checkpoints.
        last: how many of the newest checkpoints to keep, at least 1.
        best: how many of the checkpoints with the lowest `held_out_loss` in their `meta` to keep in addition.
        every: also keep the first checkpoint at or after each multiple of `every` samples.

    The newest checkpoint whose `meta` has `good` set is always kept: a diverging run is rewound to it. Checkpoints that
    can't be read now are kept, too.
    """
    if last < 1:
        raise ValueError(f"at least the last checkpoint must be kept, not the last {last}")
    if collective.rank() != 0:
        return []
    paths = checkpoints(directory)
    metas = {path: meta for path in paths if (meta := _meta(path)) is not None}
    paths = list(metas)
    good = [path for path in paths if metas[path].get("good")]
    rated = [path for path in paths if metas[path].get("held_out_loss") is not None]
    kept = {*paths[-last:], *good[-1:], *sorted(rated, key=lambda path: metas[path]["held_out_loss"])[:best]}
    if every:
        newest_first = {samples_of(path) // every: path for path in reversed(paths)}
        kept |= {path for multiple, path in newest_first.items() if multiple > 0}
    return discard([path for path in paths if path not in kept])


def discard(paths: Iterable[Path]) -> list[Path]:
    """Deletes checkpoints. Renames each one first, so that no run loads one whose deletion failed; a save retries."""
    deleted = list(paths)
    for path in deleted:
        try:
            shutil.rmtree(_rename_for_deletion(path))
        except OSError as error:
            logger.warning("%s could not be deleted: %s", path, error)
    return deleted


def _meta(path: Path) -> dict[str, Any] | None:
    """Reads a checkpoint's `meta`; empty if the checkpoint is damaged, None if it can't be read now."""
    try:
        return read_manifest(path)["meta"]
    except ValueError:
        return {}
    except OSError as error:
        logger.warning("%s is kept, because it can't be read now: %s", path, describe_os_error(error))
        return None


def _begin(temporary: Path, require_ownership: Callable[[], None]) -> None:
    """Creates the temporary directory, and deletes those of earlier saves that were killed."""
    require_ownership()
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for leftover in leftovers(temporary.parent):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()


def _write(temporary: Path, tensors: Mapping[str, FlatRange]) -> dict[str, dict[str, Any]]:
    """Writes this rank's ranges; returns the file's entry in the manifest."""
    owned_here = {name: owned for name, owned in tensors.items() if len(owned.data)}
    if not owned_here:
        return {}
    path = temporary / f"rank_{collective.rank():05d}.safetensors"
    offsets = {name: {"saved_offsets": [owned.start]} for name, owned in owned_here.items()}
    header = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    write_safetensors(path, {name: owned.data for name, owned in owned_here.items()}, header)
    ranges = {name: [owned.start, owned.stop] for name, owned in owned_here.items()}
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path), "ranges": ranges}}


def _unfit(path: Path, tensors: Mapping[str, FlatRange], *, partly: bool) -> list[str]:
    """Returns why this rank can't load its ranges from a checkpoint; empty if it can."""
    if problems := find_problems(path, checksums=False):
        return problems
    manifest = read_manifest(path)
    if problems := misfits(manifest["tensors"], tensors, partly=partly):
        return problems
    needed = [path / name for name, entry in manifest["files"].items() if _shared(entry["ranges"], tensors)]
    return [problem for file in needed if (problem := _header_problem(file, manifest["files"][file.name]["ranges"]))]


def _read(path: Path, wanted: Mapping[str, FlatRange]) -> dict[str, Any]:
    """Fills this rank's ranges from the files whose ranges overlap with them; returns the `meta`."""
    manifest = read_manifest(path)
    for file_name, entry in manifest["files"].items():
        shared = _shared(entry["ranges"], wanted)
        if not shared:
            continue
        with (path / file_name).open("rb", buffering=0) as file:
            stored = RankFile(file, entry["ranges"])
            for name, (start, stop) in shared.items():
                part = wanted[name]
                part.data[start - part.start : stop - part.start].copy_(stored.read(name, start, stop))
    return manifest["meta"]


def _shared(ranges: Mapping[str, list[int]], wanted: Mapping[str, FlatRange]) -> dict[str, tuple[int, int]]:
    """Returns the elements [start, stop) of each tensor that a file holds and a rank wants."""
    shared = {
        name: (max(offset, wanted[name].start), min(end, wanted[name].stop))
        for name, (offset, end) in ranges.items()
        if name in wanted
    }
    return {name: (start, stop) for name, (start, stop) in shared.items() if start < stop}


def _commit(temporary: Path, final: Path, manifest: dict[str, Any], require_ownership: Callable[[], None]) -> None:
    """Writes the manifest and renames the complete checkpoint to its final name."""
    require_ownership()
    (temporary / MANIFEST).write_text(signed(manifest), "utf-8")
    sync(temporary / MANIFEST)
    sync(temporary)
    replaced = _rename_for_deletion(final) if final.exists() else None
    temporary.rename(final)
    sync(final.parent)
    if replaced:
        shutil.rmtree(replaced)


def _rename_for_deletion(path: Path) -> Path:
    """Renames a checkpoint before it is deleted, so that a kill half-way leaves nothing that looks like one."""
    return path.rename(path.with_name(f"{TEMPORARY}old_{path.name}_{secrets.token_hex(4)}"))


def _file_problem(file: Path, expected: Mapping[str, Any], *, checksums: bool) -> str | None:
    try:
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"{file.name} has {size} bytes, not {expected['bytes']}"
        if checksums and file_digest(file) != expected["sha256"]:
            return f"{file.name} has a wrong checksum"
        return _header_problem(file, expected["ranges"]) if checksums else None
    except OSError as error:
        if error.errno in NO_FILE and not is_broken_link(file):
            return f"{file.name} is missing" if error.errno == errno.ENOENT else describe_os_error(error)
        raise


def _header_problem(file: Path, ranges: Mapping[str, list[int]]) -> str | None:
    """Returns how the tensors in a file differ from the manifest's ranges; None if they don't."""
    try:
        with file.open("rb", buffering=0) as opened:
            RankFile(opened, ranges)
    except ValueError as error:
        return str(error)
    return None
