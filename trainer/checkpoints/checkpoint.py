"""Checkpoints that any number of ranks saves and any other number loads.

A checkpoint is a directory `step_{samples seen}` of safetensors, one file a rank, and a `manifest.json`. Every tensor
is stored in float32 under its plain name as flat one-dimensional ranges: a rank writes the part of the flattened tensor
that it owns and asks at a load for the part that it wants, whichever ranks wrote it. Nothing is pickled into a
checkpoint and nothing is unpickled from one.

The files are laid out as by `torch.distributed.checkpoint.HuggingFaceStorageWriter(save_distributed=True)`, and torch's
reader for those reads these. They are written here because that writer takes twice the memory and several times as long
and drops, unseen, all but one of a rank's ranges of a tensor; and the overlap of flat ranges is a `max` and a `min`.

A checkpoint is written under a temporary name and renamed when every rank has written and the manifest is there: what
is called `step_…` was whole once, and the manifest's checksums tell whether it still is.

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
from typing import Any

import torch.distributed as dist
from safetensors import safe_open

from models.atomic_write import sync
from models.weights import write_safetensors
from trainer.checkpoints.names import MANIFEST, checkpoints, folder_name, samples_of
from trainer.files import file_digest
from trainer.ranks import collective
from trainer.ranks.collective import shortened
from trainer.ranks.flat_ranges import FlatRange

CHECKPOINT_FORMAT = 1
_TEMPORARY = "tmp_"

Wanted = Callable[[dict[str, Any]], bool]

logger = logging.getLogger(__name__)


def save(
    directory: Path,
    samples: int,
    tensors: Mapping[str, FlatRange],
    meta: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    permitted: Callable[[], None] = lambda: None,
) -> Path:
    """Writes `directory/step_{samples}`, in place of one of that name. All ranks.

    The tensors must not change meanwhile: `saver.Saver` gives this function a copy of them and training goes on.

    Args:
        directory: the run's checkpoints; made if it is not there.
        samples: samples seen.
        tensors: this rank's range of every tensor, in host memory, empty where it owns none. The same names on every
            rank.
        meta: what else to know of the run, as JSON has it (hashes, code version, …). Rank 0's is kept, with `samples`,
            `time` (seconds since 1970) and `world_size` added.
        group: see `collective`.
        permitted: raises on rank 0 where this run may no longer write, as another start of it has taken over.

    Returns:
        The checkpoint's path, once it is whole.

    Raises:
        OSError: on every rank, if any rank could not write. Older checkpoints are then untouched.
        ValueError: on every rank, if the ranks' ranges do not make up every tensor exactly once.
    """
    _check_cover(tensors, group)
    final = directory / folder_name(samples)
    temporary = directory / collective.on_rank_0(lambda: f"{_TEMPORARY}{final.name}_{secrets.token_hex(4)}", group)
    try:
        collective.on_rank_0(lambda: _begin(temporary, permitted), group)
        written = collective.together(lambda: _write(temporary, tensors), group)
        manifest = {
            "format": CHECKPOINT_FORMAT,
            "meta": {**meta, "samples": samples, "time": round(time.time()), "world_size": len(written)},
            "tensors": {name: list(owned.shape) for name, owned in tensors.items()},
            "files": {name: entry for rank_files in written for name, entry in rank_files.items()},
        }
        collective.on_rank_0(lambda: _commit(temporary, final, manifest, permitted), group)
    except OSError as error:
        if collective.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, collective.DISK_FULL, str(final)) from error
        raise OSError(f"could not save {final}: {error}. Older checkpoints are untouched") from error
    return final


def load(path: Path, tensors: Mapping[str, FlatRange], *, partly: bool = False) -> dict[str, Any]:
    """Fills this rank's ranges from a checkpoint and returns its `meta`. All ranks.

    Looks at the files' sizes but not at their checksums, which `latest` and `verify` do.

    Args:
        path: a checkpoint's directory.
        tensors: the range that this rank wants of every tensor, empty where it wants none.
        partly: whether the checkpoint may hold more tensors than these.

    Raises:
        ValueError: on every rank, before anything is filled, if the checkpoint is not whole, or its tensors are not
            exactly these, names and shapes. The message names them.
        OSError: on every rank, if any rank could not read.
    """
    problems = verify(path, checksums=False) or _misfits(read_manifest(path)["tensors"], tensors, partly=partly)
    everyones = list(
        dict.fromkeys(problem for rank_problems in collective.gather(problems) for problem in rank_problems)
    )
    if everyones:
        raise ValueError(f"{path} cannot be loaded: {shortened(everyones)}")
    manifest = read_manifest(path)
    collective.together(lambda: _read(path, manifest["files"], tensors))
    return manifest["meta"]


def verify(path: Path, *, checksums: bool = True) -> list[str]:
    """What is wrong with a checkpoint; empty if it is whole. Reads all of it, or only sizes without `checksums`."""
    return _problems(path, checksums=checksums)


def latest(directory: Path, *, wanted: Wanted = lambda meta: True) -> Path | None:
    """`newest` on rank 0, told to all ranks."""
    return collective.on_rank_0(lambda: newest(directory, wanted=wanted))


def newest(directory: Path, *, wanted: Wanted = lambda meta: True) -> Path | None:
    """The newest whole checkpoint whose `meta` is wanted; None if there is none.

    A damaged one is passed over, with a warning, and set aside.
    """
    for path in reversed(checkpoints(directory)):
        problems = verify(path)
        if not problems and wanted(read_manifest(path)["meta"]):
            return path
        if problems:
            aside = path.rename(path.with_name(f"damaged_{path.name}_{secrets.token_hex(4)}"))  # not counted, nor lost
            logger.warning("DAMAGED CHECKPOINT %s is passed over, now %s: %s", path, aside.name, shortened(problems))
    return None


def prune(directory: Path, *, last: int, best: int = 0, every: int | None = None) -> list[Path]:
    """Deletes checkpoints and returns those deleted. Rank 0 does it, after a save; on other ranks it does nothing.

    Args:
        directory: the run's checkpoints.
        last: how many of the newest stay, at least 1.
        best: how many with the lowest `held_out_loss` in their `meta` stay too.
        every: the first checkpoint at or after each multiple of so many samples stays too.

    The newest whose `meta` has `good` set stays as well: the one that a run in trouble returns to.
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
    """Deletes these checkpoints. What can't be deleted is no checkpoint any more, and the next save tries again."""
    deleted = list(paths)
    for path in deleted:
        try:
            shutil.rmtree(_set_aside(path))
        except OSError as error:
            logger.warning("%s could not be deleted: %s", path, error)
    return deleted


def _meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing where it is damaged."""
    try:
        return read_manifest(path)["meta"]
    except (ValueError, OSError):
        return {}


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest: `meta`, `tensors` (name → shape) and `files` (name → bytes, sha256, ranges).

    Raises:
        ValueError: if there is none, or it is damaged, or of another format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is not a checkpoint: it has no {MANIFEST}") from None
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest(manifest):
        raise ValueError(f"{path / MANIFEST} is damaged: its checksum is wrong")
    if manifest["format"] != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path} has format {manifest['format']}, and this version of the program reads {CHECKPOINT_FORMAT}"
        )
    return manifest


def _begin(temporary: Path, permitted: Callable[[], None]) -> None:
    """Makes the temporary directory, after clearing what dead attempts left."""
    permitted()
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
    """Fills this rank's ranges from the files that hold a part of them."""
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


def _commit(temporary: Path, final: Path, manifest: dict[str, Any], permitted: Callable[[], None]) -> None:
    """Makes the whole checkpoint appear under its name."""
    permitted()
    manifest = json.loads(json.dumps(manifest))  # as a reader will see it, when it comes to the checksum
    (temporary / MANIFEST).write_text(json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1), "utf-8")
    sync(temporary / MANIFEST)
    sync(temporary)
    replaced = _set_aside(final) if final.exists() else None
    temporary.rename(final)
    sync(final.parent)
    if replaced:
        shutil.rmtree(replaced)


def _set_aside(path: Path) -> Path:
    """Renames a checkpoint that is to be deleted, so that a kill half-way leaves nothing that looks like one."""
    return path.rename(path.with_name(f"{_TEMPORARY}old_{path.name}_{secrets.token_hex(4)}"))


def _check_cover(tensors: Mapping[str, FlatRange], group: dist.ProcessGroup | None) -> None:
    """Sees that the ranks' ranges make up every tensor. All ranks."""
    spans_here = {name: (owned.shape, owned.start, owned.stop) for name, owned in tensors.items()}
    everyones = collective.gather(spans_here, group)
    for name in dict.fromkeys(name for spans in everyones for name in spans):
        if not all(name in spans for spans in everyones):
            raise ValueError(f"{name} is not on every rank: one that owns nothing of it must give an empty range")
        if len({spans[name][0] for spans in everyones}) > 1:
            raise ValueError(f"{name} has not the same shape on every rank")
        numel, position = math.prod(everyones[0][name][0]), 0
        cuts = sorted(spans[name][1:] for spans in everyones if spans[name][1] < spans[name][2])
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
    """How the tensors of a checkpoint differ from those wanted."""
    missing = [f"it has no {name}" for name in wanted if name not in stored]
    unexpected = [f"it has {name}, which is not wanted" for name in stored if name not in wanted and not partly]
    misshaped = [
        f"{name} has shape {tuple(stored[name])} in it, not {part.shape}"
        for name, part in wanted.items()
        if name in stored and stored[name] != list(part.shape)
    ]
    return missing + unexpected + misshaped


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
