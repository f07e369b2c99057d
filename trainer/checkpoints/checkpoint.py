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
import hashlib
import json
import logging
import math
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
import torch.distributed as dist
from safetensors import safe_open

from models.atomic_write import sync
from models.documents import LARGEST_LIST, Moment, Natural, Positive, damaged, fits, read_json, to_json
from models.weights import write_safetensors
from trainer.checkpoints.names import MANIFEST, checkpoints, folder_name, samples_of
from trainer.files import file_digest
from trainer.ranks import collective
from trainer.ranks.collective import shortened
from trainer.ranks.flat_ranges import FlatRange

CHECKPOINT_FORMAT = 1
_TEMPORARY = "tmp_"

_MEND = "resume from another checkpoint"


class _Health(TypedDict):
    """The state of `trainer.health.Health`."""

    norms: list[float]
    skipped: list[dict[str, Any]]
    rewinds: Natural
    scaled: NotRequired[bool]
    scale: NotRequired[float]
    steps_at_scale: NotRequired[Natural]


class _Meta(TypedDict):
    samples: Natural
    world_size: Positive
    time: NotRequired[Moment]
    stage: NotRequired[str]
    config: NotRequired[str]
    base: NotRequired[str]
    strategy: NotRequired[str]
    steps: NotRequired[Natural]
    passed_over: NotRequired[int]
    health: NotRequired[_Health | None]
    good: NotRequired[bool]
    unsaved: NotRequired[bool]
    held_out_loss: NotRequired[float | None]


class _File(TypedDict):
    bytes: Natural
    sha256: str
    ranges: dict[str, Annotated[list[Natural], msgspec.Meta(min_length=2, max_length=2)]]


class _Manifest(TypedDict):
    format: int
    meta: _Meta
    tensors: dict[str, list[Natural]]
    files: dict[str, _File]


Wanted = Callable[[dict[str, Any]], bool]

logger = logging.getLogger(__name__)


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
    _check_cover(tensors, group)
    final = directory / folder_name(samples)
    temporary = directory / collective.on_rank_0(lambda: f"{_TEMPORARY}{final.name}_{secrets.token_hex(4)}", group)
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
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, collective.DISK_FULL, str(final)) from error
        raise OSError(f"could not save {final}: {error}. Older checkpoints are untouched") from error
    return final


def load(path: Path, tensors: Mapping[str, FlatRange], *, partly: bool = False) -> dict[str, Any]:
    """Fills this rank's ranges from a checkpoint and returns its `meta`. All ranks.

    Checks the files' sizes but not their checksums; `newest` and `find_problems` check those.

    Args:
        path: a checkpoint's directory.
        tensors: the range of every tensor that this rank loads; empty if it loads nothing of the tensor.
        partly: whether the checkpoint may contain further tensors.

    Raises:
        ValueError: on every rank, before anything is filled, if the checkpoint is incomplete, or the names and shapes
            of its tensors differ from `tensors`. The message names them.
        OSError: on every rank, if any rank could not read.
    """
    problems = find_problems(path, checksums=False) or _misfits(read_manifest(path)["tensors"], tensors, partly=partly)
    of_all_ranks = list(
        dict.fromkeys(problem for rank_problems in collective.gather(problems) for problem in rank_problems)
    )
    if of_all_ranks:
        raise ValueError(f"{path} cannot be loaded: {shortened(of_all_ranks)}")
    manifest = read_manifest(path)
    collective.together(lambda: _read(path, manifest["files"], tensors))
    return manifest["meta"]


def find_problems(path: Path, *, checksums: bool = True) -> list[str]:
    """Returns the problems of a checkpoint; empty if it is complete and undamaged.

    Reads every file to compare its checksum, or without `checksums` only compares file sizes.
    """
    return _problems(path, checksums=checksums)


def newest_on_all_ranks(directory: Path, *, wanted: Wanted = lambda meta: True) -> Path | None:
    """Calls `newest` on rank 0 and returns its result on all ranks. All ranks."""
    return collective.on_rank_0(lambda: newest(directory, wanted=wanted))


def newest(directory: Path, *, wanted: Wanted = lambda meta: True) -> Path | None:
    """Returns the newest undamaged checkpoint whose `meta` satisfies `wanted`; None if no checkpoint does.

    Renames each damaged checkpoint that it finds to `damaged_…`, and logs a warning.
    """
    for path in reversed(checkpoints(directory)):
        problems = find_problems(path)
        if not problems and wanted(read_manifest(path)["meta"]):
            return path
        if problems:
            # Its new name keeps `prune` from counting it; a user may still want to recover what it holds.
            renamed = path.rename(path.with_name(f"damaged_{path.name}_{secrets.token_hex(4)}"))
            logger.warning(
                "DAMAGED CHECKPOINT %s is passed over and renamed to %s: %s", path, renamed.name, shortened(problems)
            )
    return None


def prune(directory: Path, *, last: int, best: int = 0, every: int | None = None) -> list[Path]:
    """Deletes checkpoints that are not to be kept, and returns their paths. Does nothing on ranks other than 0.

    Args:
        directory: the folder of the run's checkpoints.
        last: how many of the newest checkpoints to keep, at least 1.
        best: how many of the checkpoints with the lowest `held_out_loss` in their `meta` to keep in addition.
        every: also keep the first checkpoint at or after each multiple of `every` samples.

    The newest checkpoint whose `meta` has `good` set is always kept: a diverging run is rewound to it.
    """
    if last < 1:
        raise ValueError(f"at least the last checkpoint must be kept, not the last {last}")
    if collective.rank() != 0:
        return []
    paths = checkpoints(directory)
    metas = {path: _meta(path) for path in paths}
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


def _meta(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's `meta`; empty if the checkpoint is damaged."""
    try:
        return read_manifest(path)["meta"]
    except (ValueError, OSError):
        return {}


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's manifest: `meta`, `tensors` (name → shape) and `files` (name → bytes, sha256, ranges).

    Raises:
        ValueError: if the manifest is missing, damaged, or of another format.
    """
    try:
        manifest = read_json(path / MANIFEST, dict[str, Any], mend=_MEND, most=LARGEST_LIST)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is not a checkpoint: it has no {MANIFEST}") from None
    if manifest.pop("sha256", None) != _digest(manifest):
        raise damaged(path / MANIFEST, "its checksum is wrong", _MEND)
    if manifest.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')}, but this version of the program reads {CHECKPOINT_FORMAT}"
        )
    fits(manifest, _Manifest, path / MANIFEST, mend=_MEND)
    return manifest


def _begin(temporary: Path, require_ownership: Callable[[], None]) -> None:
    """Creates the temporary directory, and deletes those of earlier saves that were killed."""
    require_ownership()
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for leftover in temporary.parent.glob(f"{_TEMPORARY}*"):
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


def _read(path: Path, files: Mapping[str, dict[str, Any]], wanted: Mapping[str, FlatRange]) -> None:
    """Fills this rank's ranges from the files whose ranges overlap with them."""
    for file_name, entry in files.items():
        shared = {
            name: (offset, max(offset, wanted[name].start), min(end, wanted[name].stop))
            for name, (offset, end) in entry["ranges"].items()
            if name in wanted
        }
        shared = {name: (offset, start, stop) for name, (offset, start, stop) in shared.items() if start < stop}
        if not shared:
            continue
        with safe_open(path / file_name, framework="pt") as file:
            for name, (offset, start, stop) in shared.items():
                part = wanted[name]
                stored = file.get_slice(name)[start - offset : stop - offset]
                part.data[start - part.start : stop - part.start].copy_(stored)


def _commit(temporary: Path, final: Path, manifest: dict[str, Any], require_ownership: Callable[[], None]) -> None:
    """Writes the manifest and renames the complete checkpoint to its final name."""
    require_ownership()
    manifest = json.loads(json.dumps(manifest))  # The checksum must be that of the manifest as a reader parses it.
    (temporary / MANIFEST).write_text(to_json({**manifest, "sha256": _digest(manifest)}, indent=1), "utf-8")
    sync(temporary / MANIFEST)
    sync(temporary)
    replaced = _rename_for_deletion(final) if final.exists() else None
    temporary.rename(final)
    sync(final.parent)
    if replaced:
        shutil.rmtree(replaced)


def _rename_for_deletion(path: Path) -> Path:
    """Renames a checkpoint before it is deleted, so that a kill half-way leaves nothing that looks like one."""
    return path.rename(path.with_name(f"{_TEMPORARY}old_{path.name}_{secrets.token_hex(4)}"))


def _check_cover(tensors: Mapping[str, FlatRange], group: dist.ProcessGroup | None) -> None:
    """Raises ValueError unless the ranks' ranges cover every tensor exactly once. All ranks."""
    spans_here = {name: (owned.shape, owned.start, owned.stop) for name, owned in tensors.items()}
    of_ranks = collective.gather(spans_here, group)
    for name in dict.fromkeys(name for spans in of_ranks for name in spans):
        if not all(name in spans for spans in of_ranks):
            raise ValueError(f"{name} is not on every rank: a rank that owns nothing of it must pass an empty range")
        if len({spans[name][0] for spans in of_ranks}) > 1:
            raise ValueError(f"{name} does not have the same shape on every rank")
        numel, position = math.prod(of_ranks[0][name][0]), 0
        cuts = sorted(spans[name][1:] for spans in of_ranks if spans[name][1] < spans[name][2])
        for start, stop in [*cuts, (numel, numel)]:
            if start != position:
                raise ValueError(f"the ranks' ranges of {name} have a gap or an overlap at {min(start, position)}")
            position = stop


def _problems(path: Path, *, checksums: bool) -> list[str]:
    try:
        files = read_manifest(path)["files"]
    except (ValueError, OSError) as error:
        return [str(error)]
    unknown = [f"{file.name} is not in the manifest" for file in path.glob("*.safetensors") if file.name not in files]
    known = [_file_problem(path / name, expected, checksums=checksums) for name, expected in files.items()]
    return unknown + [problem for problem in known if problem]


def _file_problem(file: Path, expected: Mapping[str, Any], *, checksums: bool) -> str | None:
    try:
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"{file.name} has {size} bytes, not {expected['bytes']}"
        if checksums and file_digest(file) != expected["sha256"]:
            return f"{file.name} has a wrong checksum"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read: {error}"
    return None


def _misfits(stored: Mapping[str, list[int]], wanted: Mapping[str, FlatRange], *, partly: bool) -> list[str]:
    """Returns how the tensors of a checkpoint differ from those to be loaded."""
    missing = [f"it has no {name}" for name in wanted if name not in stored]
    unexpected = [
        f"it has {name}, which this run does not have" for name in stored if name not in wanted and not partly
    ]
    misshaped = [
        f"its {name} has shape {tuple(stored[name])}, not {part.shape}"
        for name, part in wanted.items()
        if name in stored and stored[name] != list(part.shape)
    ]
    return missing + unexpected + misshaped


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
