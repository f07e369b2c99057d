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
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from models.weights import write_safetensors
from trainer import collective
from trainer.collective import shortened
from trainer.data.files import file_digest

FORMAT = 1
MANIFEST = "manifest.json"

_NAME = re.compile(r"step_(\d{12,})")
_TEMPORARY = "tmp_"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FlatRange:
    """Elements [start, stop) of a flattened tensor: what one rank owns of it, or wants of it."""

    data: Tensor
    """float32, one-dimensional and contiguous: the elements themselves, which a load fills in place."""
    shape: tuple[int, ...]
    """The whole tensor's own shape."""
    start: int = 0

    def __post_init__(self) -> None:
        assert self.data.dim() == 1, f"a range has one dimension, not {self.data.dim()}"
        assert self.data.is_contiguous(), "a range must be contiguous, or a load could not fill it in place"
        assert self.data.dtype == torch.float32, f"a checkpoint holds float32, not {self.data.dtype}"
        fits = 0 <= self.start <= self.stop <= math.prod(self.shape)
        assert fits, f"[{self.start}, {self.stop}) is not within a tensor of shape {self.shape}"

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + len(self.data)


def whole_ranges(tensors: Mapping[str, Tensor]) -> dict[str, FlatRange]:
    """All of every tensor: what one process saves, and what every rank of DDP loads."""
    return equal_ranges(tensors, rank=0, world_size=1)


def equal_ranges(tensors: Mapping[str, Tensor], *, rank: int, world_size: int) -> dict[str, FlatRange]:
    """What this rank writes of tensors that every rank holds, as in DDP: one of `world_size` equal parts."""
    whole = {}
    for name, tensor in tensors.items():
        assert tensor.is_contiguous(), f"{name} is not contiguous: a load could not fill it in place"
        whole[name] = FlatRange(tensor.detach().view(-1), tuple(tensor.shape))
    return share(whole, index=rank, copies=world_size)


def share(ranges: Mapping[str, FlatRange], *, index: int, copies: int) -> dict[str, FlatRange]:
    """Of ranges that `copies` ranks hold alike, what the rank with this index among them writes.

    The ranges laid end to end are cut into `copies` equal parts. Each part of a range is a view; some are empty.
    """
    total = sum(len(held.data) for held in ranges.values())
    first, last = total * index // copies, total * (index + 1) // copies
    parts, position = {}, 0
    for name, held in ranges.items():
        start, stop = (min(max(cut - position, 0), len(held.data)) for cut in (first, last))
        parts[name] = FlatRange(held.data[start:stop], held.shape, held.start + start)
        position += len(held.data)
    return parts


def save(directory: Path, samples: int, tensors: Mapping[str, FlatRange], meta: Mapping[str, Any]) -> Path:
    """Writes `directory/step_{samples}`, in place of one of that name. All ranks.

    Args:
        directory: the run's checkpoints; made if it is not there.
        samples: samples seen.
        tensors: this rank's range of every tensor, empty where it owns none. The same names on every rank.
        meta: what else to know of the run, as JSON has it (hashes, code version, …). Rank 0's is kept, with `samples`
            and `world_size` added.

    Returns:
        The checkpoint's path, once it is whole.

    Raises:
        OSError: on every rank, if any rank could not write. Older checkpoints are then untouched.
        ValueError: on every rank, if the ranks' ranges do not make up every tensor exactly once.
    """
    _check_cover(tensors)
    snapshot = {name: _on_host(owned) for name, owned in tensors.items() if len(owned.data)}
    final = directory / f"step_{samples:012d}"
    temporary = directory / collective.on_rank_0(lambda: f"{_TEMPORARY}{final.name}_{secrets.token_hex(4)}")
    try:
        collective.on_rank_0(lambda: _begin(temporary))
        written = collective.together(lambda: _write(temporary, snapshot))
        manifest = {
            "format": FORMAT,
            "meta": {**meta, "samples": samples, "world_size": len(written)},
            "tensors": {name: list(owned.shape) for name, owned in tensors.items()},
            "files": {name: entry for rank_files in written for name, entry in rank_files.items()},
        }
        collective.on_rank_0(lambda: _commit(temporary, final, manifest))
    except OSError as error:
        if collective.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, collective.DISK_FULL, str(final)) from error
        raise OSError(f"could not save {final}: {error}. Older checkpoints are untouched") from error
    return final


def load(path: Path, tensors: Mapping[str, FlatRange]) -> dict[str, Any]:
    """Fills this rank's ranges from a checkpoint and returns its `meta`. All ranks.

    Looks at the files' sizes but not at their checksums, which `latest` and `verify` do.

    Args:
        path: a checkpoint's directory.
        tensors: the range that this rank wants of every tensor, empty where it wants none.

    Raises:
        ValueError: on every rank, before anything is filled, if the checkpoint is not whole, or its tensors are not
            exactly these, names and shapes. The message names them.
        OSError: on every rank, if any rank could not read.
    """
    problems = _problems(path, checksums=False) or _misfits(read_manifest(path)["tensors"], tensors)
    everyones = list(
        dict.fromkeys(problem for rank_problems in collective.gather(problems) for problem in rank_problems)
    )
    if everyones:
        raise ValueError(f"{path} cannot be loaded: {shortened(everyones)}")
    manifest = read_manifest(path)
    collective.together(lambda: _read(path, manifest["files"], tensors))
    return manifest["meta"]


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint; empty if it is whole. Reads all of it."""
    return _problems(path, checksums=True)


def latest(directory: Path) -> Path | None:
    """The newest whole checkpoint; None if there is none. A damaged one is passed over, with a warning. All ranks."""

    def newest_whole() -> Path | None:
        for path in reversed(checkpoints(directory)):
            problems = verify(path)
            if not problems:
                return path
            aside = path.rename(path.with_name(f"damaged_{path.name}_{secrets.token_hex(4)}"))  # not counted, nor lost
            log.warning("DAMAGED CHECKPOINT %s is passed over, now %s: %s", path, aside.name, shortened(problems))
        return None

    return collective.on_rank_0(newest_whole)


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, damaged ones too, by samples seen."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), key=samples_of)


def samples_of(path: Path) -> int:
    """The samples seen that a checkpoint's name tells."""
    return int(path.name.removeprefix("step_"))


def prune(directory: Path, *, last: int, every: int | None = None, best: Collection[int] = ()) -> list[Path]:
    """Deletes checkpoints and returns those deleted. Rank 0 does it, after a save; on other ranks it does nothing.

    Args:
        directory: the run's checkpoints.
        last: how many of the newest stay, at least 1.
        every: the first checkpoint at or after each multiple of so many samples stays too.
        best: the samples seen of others that stay.
    """
    if last < 1:
        raise ValueError(f"at least the last checkpoint must be kept, not the last {last}")
    if collective.rank() != 0:
        return []
    paths = checkpoints(directory)
    kept = {*paths[-last:], *(path for path in paths if samples_of(path) in best)}
    if every:
        newest_first = {samples_of(path) // every: path for path in reversed(paths)}
        kept |= {path for multiple, path in newest_first.items() if multiple > 0}
    deleted = [path for path in paths if path not in kept]
    for path in deleted:
        shutil.rmtree(_set_aside(path))
    return deleted


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
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} has format {manifest['format']}, and this version of the program reads {FORMAT}")
    return manifest


def _on_host(owned: FlatRange) -> FlatRange:
    """A copy in host memory: the training may go on changing the original."""
    return FlatRange(owned.data.to("cpu", copy=True), owned.shape, owned.start)


def _begin(temporary: Path) -> None:
    """Makes the temporary directory, after clearing what dead attempts left."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for leftover in temporary.parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()


def _write(temporary: Path, snapshot: Mapping[str, FlatRange]) -> dict[str, dict[str, Any]]:
    """Writes this rank's ranges; returns the file's entry in the manifest."""
    if not snapshot:
        return {}
    path = temporary / f"rank_{collective.rank():05d}.safetensors"
    offsets = {name: {"saved_offsets": [owned.start]} for name, owned in snapshot.items()}
    header = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    write_safetensors(path, {name: owned.data for name, owned in snapshot.items()}, header)
    ranges = {name: [owned.start, owned.stop] for name, owned in snapshot.items()}
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path), "ranges": ranges}}


def _read(path: Path, files: Mapping[str, dict[str, Any]], wanted: Mapping[str, FlatRange]) -> None:
    """Fills this rank's ranges from the files that hold a part of them."""
    for file_name, entry in files.items():
        shared = {
            name: (offset, max(offset, wanted[name].start), min(end, wanted[name].stop))
            for name, (offset, end) in entry["ranges"].items()
        }
        shared = {name: (offset, start, stop) for name, (offset, start, stop) in shared.items() if start < stop}
        if not shared:
            continue
        with safe_open(path / file_name, framework="pt") as file:
            for name, (offset, start, stop) in shared.items():
                part = wanted[name]
                stored = file.get_slice(name)[start - offset : stop - offset]
                part.data[start - part.start : stop - part.start].copy_(stored)


def _commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Makes the whole checkpoint appear under its name."""
    manifest = json.loads(json.dumps(manifest))  # as a reader will see it, when it comes to the checksum
    (temporary / MANIFEST).write_text(json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1), "utf-8")
    _sync(temporary / MANIFEST)
    _sync(temporary)
    replaced = _set_aside(final) if final.exists() else None
    temporary.rename(final)
    _sync(final.parent)
    if replaced:
        shutil.rmtree(replaced)


def _set_aside(path: Path) -> Path:
    """Renames a checkpoint that is to be deleted, so that a kill half-way leaves nothing that looks like one."""
    return path.rename(path.with_name(f"{_TEMPORARY}old_{path.name}_{secrets.token_hex(4)}"))


def _sync(path: Path) -> None:
    """Has a file or a directory on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_cover(tensors: Mapping[str, FlatRange]) -> None:
    """Sees that the ranks' ranges make up every tensor. All ranks."""
    everyones = collective.gather({name: (owned.shape, owned.start, owned.stop) for name, owned in tensors.items()})
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


def _misfits(stored: Mapping[str, list[int]], wanted: Mapping[str, FlatRange]) -> list[str]:
    """How the tensors of a checkpoint differ from those wanted."""
    missing = [f"it has no {name}" for name in wanted if name not in stored]
    unexpected = [f"it has {name}, which is not wanted" for name in stored if name not in wanted]
    misshaped = [
        f"{name} has shape {tuple(stored[name])} in it, not {part.shape}"
        for name, part in wanted.items()
        if name in stored and stored[name] != list(part.shape)
    ]
    return missing + unexpected + misshaped


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
