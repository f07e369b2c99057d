"""Sharded checkpoints: any number of ranks saves one, and any other number of ranks loads it.

A checkpoint is a directory `step_{samples seen}` with safetensors files and a `manifest.json`. Every tensor is stored
in float32 under its plain name as flat one-dimensional ranges: each rank writes the range of the flattened tensor that
it owns, together with its neighbours' where they are small (`writers`), and a load reads any range, whichever ranks
wrote it (`loading`). Checkpoints contain no pickled data.

The files have the layout of `torch.distributed.checkpoint.HuggingFaceStorageWriter(save_distributed=True)`, and torch's
reader for that layout can read them. This module does not use torch's writer because that writer takes twice the memory
and several times as long, and silently drops all but one of a rank's ranges of a tensor.

A checkpoint is written under a temporary name, and renamed once every rank has written its file and the manifest is
complete. A directory named `step_…` was therefore complete when it was written, and the manifest's checksums show
whether it still is.

"All ranks" marks the functions that all ranks must call together. Without a process group there is one rank.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from models.atomic_write import sync
from models.disk_errors import mend_words, room_words, with_number
from models.readable import describe_os_error
from models.weights import write_safetensors
from trainer.checkpoints.cover import check_cover
from trainer.checkpoints.loading import load as load
from trainer.checkpoints.manifest import CHECKPOINT_FORMAT, OtherFormatError, read_manifest, signed
from trainer.checkpoints.names import MANIFEST, TEMPORARY, checkpoints, folder_name, leftovers, samples_of
from trainer.checkpoints.problems import find_problems
from trainer.checkpoints.retention import Retention
from trainer.checkpoints.writers import gather_to_writers, spans_of
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
        group: see `collective`; it exchanges tensors in host memory.
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
        files = _write_files(temporary, tensors, group)
        manifest = {
            "format": CHECKPOINT_FORMAT,
            "meta": {**meta, "samples": samples, "time": round(time.time()), "world_size": collective.world_size()},
            "tensors": {name: list(owned.shape) for name, owned in tensors.items()},
            "files": files,
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
        set_aside(path, problems)
    return found


def set_all_aside(directory: Path) -> None:
    """Renames all checkpoints of a directory, which are all damaged, to `damaged_…`, so that a run can begin anew."""
    for path in checkpoints(directory):
        set_aside(path, find_problems(path))


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


def set_aside(path: Path, problems: list[str]) -> None:
    """Renames a damaged checkpoint, so that `prune` does not count it; a user may want to recover what it holds."""
    renamed = path.rename(path.with_name(f"damaged_{path.name}_{secrets.token_hex(4)}"))
    logger.warning(
        "DAMAGED CHECKPOINT %s is passed over and renamed to %s: %s", path, renamed.name, shortened(problems)
    )


def prune(
    directory: Path, *, last: int, best: int = 0, every: int | None = None, held: Collection[Path] = ()
) -> list[Path]:
    """Deletes checkpoints that are not to be kept, and returns their paths. Does nothing on ranks other than 0.

    Args:
        directory: the folder of the run's checkpoints.
        last: how many of the newest checkpoints to keep, at least 1.
        best: how many of the checkpoints with the lowest `held_out_loss` in their `meta` to keep in addition.
        every: also keep the first checkpoint at or after each multiple of `every` samples.
        held: checkpoints that something still reads, which stay whatever the rule says.

    The newest checkpoint whose `meta` has `good` set is always kept: a diverging run is rewound to it. Checkpoints that
    can't be read now are kept, too.
    """
    rule = Retention(last, best, every)
    if collective.rank() != 0:
        return []
    metas = {path: meta for path in checkpoints(directory) if (meta := _meta(path)) is not None}
    kept = rule.kept({samples_of(path): meta for path, meta in metas.items()})
    return discard([path for path in metas if samples_of(path) not in kept and path not in held])


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


def _write_files(
    temporary: Path, tensors: Mapping[str, FlatRange], group: dist.ProcessGroup | None
) -> dict[str, dict[str, Any]]:
    """Writes the files of all ranks; returns their entries in the manifest on rank 0, and {} elsewhere. All ranks."""
    held = gather_to_writers(tensors, group)
    names = [f"rank_{collective.rank() + number:05d}.safetensors" for number in range(len(held))]
    files = dict(zip(names, held, strict=True))
    written = collective.together(lambda: {name: _write(temporary / name, part) for name, part in files.items()}, group)
    # The ranges go to rank 0 alone: those of many ranks would fill the memory of each of them.
    spans = {name: spans_of(part) for name, part in files.items()}
    writers = [rank for rank, entries in enumerate(written) if entries]
    of_writers = collective.collect(spans, group, senders=writers, receiver=0)
    entries = {name: entry for entries in written for name, entry in entries.items()}
    return {name: {**entries[name], "ranges": ranges} for spans in of_writers for name, ranges in spans.items()}


def _write(path: Path, held: Mapping[str, FlatRange]) -> dict[str, Any]:
    """Writes one file of ranges; returns its size and its checksum."""
    offsets = {name: {"saved_offsets": [part.start]} for name, part in held.items()}
    header = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    write_safetensors(path, {name: part.data for name, part in held.items()}, header)
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


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
