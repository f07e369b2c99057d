"""A checkpoint's manifest: which tensors there are, which file holds which range of them, and the run's metadata.

The manifest is signed, so that damage shows. A signature does not show that the manifest is right: it may have been
merged by hand, or written by a faulty version. It is therefore checked whether each tensor is covered exactly once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer.checkpoints.names import MANIFEST

CHECKPOINT_FORMAT = 1
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


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
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        right = isinstance(manifest, dict) and manifest.pop("sha256", None) == digest(manifest)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ValueError(f"{path} is not a checkpoint: it has no {MANIFEST}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path / MANIFEST} is damaged: {error}") from None
    if not right:
        raise ValueError(f"{path / MANIFEST} is damaged: its checksum is wrong")
    if manifest.get("format") != CHECKPOINT_FORMAT:
        raise OtherFormatError(
            f"{path} has format {manifest.get('format')}, but this version of the program reads {CHECKPOINT_FORMAT}"
        )
    if wrong := next(_malformed(manifest), None):
        raise ValueError(f"{path / MANIFEST} is damaged: {wrong}")
    return manifest


def signed(manifest: Mapping[str, Any]) -> str:
    """Returns the text of a manifest file, with its checksum added."""
    plain = json.loads(json.dumps(manifest))  # The checksum must be that of the manifest as a reader parses it.
    return json.dumps({**plain, "sha256": digest(plain)}, indent=1)


def digest(manifest: Mapping[str, Any]) -> str:
    """Returns the SHA-256 in hex of a manifest without its checksum."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def uncovered(manifest: Mapping[str, Any]) -> list[str]:
    """Returns the tensors whose ranges do not cover every element exactly once; each names the tensor and the file."""
    ranges: dict[str, list[tuple[int, int, str]]] = {name: [] for name in manifest["tensors"]}
    problems = []
    for file, entry in manifest["files"].items():
        for name, (start, stop) in entry["ranges"].items():
            if name not in ranges:
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


def _malformed(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yields what a manifest lacks of the form that every reader relies on."""
    for key in ("meta", "tensors", "files"):
        if not isinstance(manifest.get(key), dict):
            yield f"it has no {key}"
    meta = manifest["meta"]
    for key in ("samples", "world_size"):
        if not _is_count(meta.get(key)):
            yield f"its meta has no whole number {key}"
    for name, shape in manifest["tensors"].items():
        if not isinstance(shape, list) or not all(map(_is_count, shape)):
            yield f"the shape of {name} is not a list of whole numbers"
    for file, entry in manifest["files"].items():
        if not _FILE_NAME.fullmatch(file):
            yield f"{file!a} is not the name of a rank's file"
        if not isinstance(entry, dict) or not _is_count(entry.get("bytes")) or not isinstance(entry.get("sha256"), str):
            yield f"{file} has no size or no checksum"
        elif not isinstance(entry.get("ranges"), dict):
            yield f"{file} has no ranges"
        else:
            yield from (
                f"{file} has a bad range of {name}" for name, cut in entry["ranges"].items() if not _is_range(cut)
            )


def _is_range(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)) and value[0] <= value[1]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
