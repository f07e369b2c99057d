"""Loads a checkpoint into any number of ranks, whatever number of ranks wrote it.

Rank 0 alone reads the manifest and compares the files' sizes. Of tensors that every rank wants whole, as all are under
DDP, each rank reads an equal share, and a collective spreads the shares. Of all others, a rank reads its own ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from models.disk_errors import patiently
from trainer.checkpoints.manifest import misfits, read_manifest
from trainer.checkpoints.problems import header_problem, problems_beside
from trainer.checkpoints.rank_file import RankFile
from trainer.ranks import collective
from trainer.ranks.collective import shortened
from trainer.ranks.flat_ranges import FlatRange, split_among_copies
from trainer.ranks.whole_tensors import spread, whole_on_all_ranks


def load(path: Path, tensors: Mapping[str, FlatRange], *, partly: bool = False) -> dict[str, Any]:
    """Fill this rank's ranges from a checkpoint and return its `meta`. All ranks.

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
    manifest, problems = collective.on_rank_0(lambda: _inspected(path))
    _require_none(path, problems)
    of_ranks = collective.together(lambda: misfits(manifest["tensors"], tensors, partly=partly))
    _require_none(path, [problem for rank_problems in of_ranks for problem in rank_problems])

    # Decide what this rank reads, and check the headers of the files that hold it.
    whole = whole_on_all_ranks(manifest["tensors"], tensors)
    shared = {name: part for name, part in tensors.items() if name in whole}
    to_read = read_by_rank(tensors, shared, rank=collective.rank(), ranks=collective.world_size())
    files = {name: entry["ranges"] for name, entry in manifest["files"].items()}
    needed = [name for name, ranges in files.items() if overlaps(ranges, to_read)]
    of_ranks = collective.together(
        lambda: [problem for name in needed if (problem := header_problem(path / name, files[name]))]
    )
    _require_none(path, [problem for rank_problems in of_ranks for problem in rank_problems])

    collective.together(lambda: _fill(path, {name: files[name] for name in needed}, to_read))
    spread(shared)
    return manifest["meta"]


def read_by_rank(
    wanted: Mapping[str, FlatRange], shared: Mapping[str, FlatRange], *, rank: int, ranks: int
) -> dict[str, FlatRange]:
    """Return the ranges that a rank reads from the disk: its share of what all ranks want whole, and all else whole."""
    own = {name: part for name, part in wanted.items() if name not in shared}
    return own | split_among_copies(shared, index=rank, copies=ranks)


def overlaps(ranges: Mapping[str, list[int]], wanted: Mapping[str, FlatRange]) -> dict[str, tuple[int, int]]:
    """Return the elements [start, stop) of each tensor that a file holds and a rank reads."""
    both = {
        name: (max(offset, wanted[name].start), min(end, wanted[name].stop))
        for name, (offset, end) in ranges.items()
        if name in wanted
    }
    return {name: (start, stop) for name, (start, stop) in both.items() if start < stop}


def _inspected(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the manifest, and find the problems that show without reading the files."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return {}, [str(error)]
    return manifest, problems_beside(path, manifest, checksums=False)


def _require_none(path: Path, problems: list[str]) -> None:
    if different := list(dict.fromkeys(problems)):
        raise ValueError(f"{path} cannot be loaded: {shortened(different)}")


def _fill(path: Path, files: Mapping[str, Mapping[str, list[int]]], wanted: Mapping[str, FlatRange]) -> None:
    """Fill the ranges that a rank reads from the files that hold them; `files` maps a file's name to its ranges."""
    for file_name, ranges in files.items():
        patiently(partial(_fill_from, path / file_name, ranges, wanted))


def _fill_from(path: Path, ranges: Mapping[str, list[int]], wanted: Mapping[str, FlatRange]) -> None:
    with path.open("rb", buffering=0) as file:
        stored = RankFile(file, ranges)
        for name, (start, stop) in overlaps(ranges, wanted).items():
            part = wanted[name]
            part.data[start - part.start : stop - part.start].copy_(stored.read(name, start, stop))
