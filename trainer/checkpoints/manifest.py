"""A checkpoint's manifest: which tensors there are, which file holds which range of them, and the run's metadata.

The manifest is signed, so that damage shows. A signature does not show that the manifest is right: it may have been
merged by hand, or written by a faulty version. It is therefore checked whether each tensor is covered exactly once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypedDict

import msgspec

from models.documents import LARGEST_LIST, Moment, Natural, Positive, damaged, fits, read_json, to_json
from models.readable import is_broken_link
from trainer.checkpoints.names import MANIFEST

if TYPE_CHECKING:  # the process that uploads checkpoints does without torch
    from trainer.ranks.flat_ranges import FlatRange

CHECKPOINT_FORMAT = 1
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")

_MEND = "resume from another checkpoint"
LARGEST_MANIFEST = 1 << 30
"""Bytes of a manifest, which lists the ranges of all tensors on all ranks; its checksum vouches for it."""


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
    left_out: NotRequired[list[str]]


class _File(TypedDict):
    bytes: Natural
    sha256: str
    ranges: dict[str, Annotated[list[Natural], msgspec.Meta(min_length=2, max_length=2)]]


class _Manifest(TypedDict):
    format: int
    meta: _Meta
    tensors: dict[str, list[Natural]]
    files: dict[str, _File]


class OtherFormatError(ValueError):
    """A manifest was written in a format that this version does not read. The checkpoint may be whole."""


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's manifest: `meta`, `tensors` (name → shape) and `files` (name → bytes, sha256, ranges).

    Raises:
        OtherFormatError: if another version of the program wrote it.
        ValueError: if the manifest is missing, damaged, or lacks what a manifest holds.
        OSError: if it can't be read now. It may be whole.
    """
    try:
        most = min(LARGEST_MANIFEST, max(LARGEST_LIST, (path / MANIFEST).stat().st_size))
        manifest = read_json(path / MANIFEST, dict[str, Any], mend=_MEND, most=most)
    except (FileNotFoundError, NotADirectoryError):
        if link := next((link for link in (path, path / MANIFEST) if is_broken_link(link)), None):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(link)) from None
        raise ValueError(f"{path} is not a checkpoint: it has no {MANIFEST}") from None
    if manifest.pop("sha256", None) != digest(manifest):
        raise damaged(path / MANIFEST, "its checksum is wrong", _MEND)
    if manifest.get("format") != CHECKPOINT_FORMAT:
        raise OtherFormatError(
            f"{path} has format {manifest.get('format')}, but this version of the program reads {CHECKPOINT_FORMAT}"
        )
    fits(manifest, _Manifest, path / MANIFEST, mend=_MEND)
    if stray := next((file for file in manifest["files"] if not _FILE_NAME.fullmatch(file)), None):
        raise damaged(path / MANIFEST, f"{stray!a} is not the name of a rank's file", _MEND)
    return manifest


def signed(manifest: Mapping[str, Any]) -> str:
    """Returns the text of a manifest file, with its checksum added."""
    plain = json.loads(json.dumps(manifest))  # The checksum must be that of the manifest as a reader parses it.
    return to_json({**plain, "sha256": digest(plain)}, indent=1)


def digest(manifest: Mapping[str, Any]) -> str:
    """Returns the SHA-256 in hex of a manifest without its checksum."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def uncovered(manifest: Mapping[str, Any]) -> list[str]:
    """Returns the tensors whose ranges do not cover every element exactly once; each names the tensor and the file."""
    ranges: dict[str, list[tuple[int, int, str]]] = {name: [] for name in manifest["tensors"]}
    problems = []
    for file, entry in manifest["files"].items():
        for name, (start, stop) in entry["ranges"].items():
            if start > stop:
                problems.append(f"{file} holds {name} from {start} to {stop}, which is no range")
            elif name not in ranges:
                problems.append(f"{file} holds {name}, which is not among the tensors")
            elif start < stop:
                ranges[name].append((start, stop, file))
    for name, shape in manifest["tensors"].items():
        numel = math.prod(shape)
        cuts = [(0, 0, ""), *sorted(ranges[name]), (numel, numel, "")]
        problem = next((_step_problem(name, numel, *step) for step in pairwise(cuts) if step[0][1] != step[1][0]), None)
        problems += [problem] if problem else []
    return problems


def _step_problem(name: str, numel: int, left: tuple[int, int, str], right: tuple[int, int, str]) -> str:
    """Says what is wrong between two ranges (start, stop, file) that should follow on each other."""
    if left[1] > numel:
        return f"{left[2]} holds elements of {name} up to {left[1]}, but it has {numel}"
    if left[1] < right[0]:
        near = f" after {left[2]}" if left[2] else f" before {right[2]}" if right[2] else ""
        return f"no file holds the elements {left[1]} to {right[0]} of {name}{near}"
    return f"both {left[2]} and {right[2]} hold the elements {right[0]} to {min(left[1], right[1])} of {name}"


def misfits(stored: Mapping[str, list[int]], wanted: Mapping[str, FlatRange], *, partly: bool) -> list[str]:
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
