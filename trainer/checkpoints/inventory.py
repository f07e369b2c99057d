"""Tables of what checkpoints contain, for `spresso checkpoint` and for the log of a run that resumes from one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models.readable import describe_os_error
from trainer.checkpoints import checkpoint
from trainer.checkpoints.manifest import read_manifest
from trainer.checkpoints.names import MANIFEST, checkpoints, samples_of
from trainer.formatting import aligned, size

_KINDS_WITHOUT_PARTS = ("statistics",)  # kinds of tensors that the table does not split by parts of the model


def find_checkpoints(location: Path) -> list[Path]:
    """List the checkpoints below a run directory, a stage's folder or a folder of checkpoints; or a checkpoint itself.

    Raises:
        ValueError: the location holds no checkpoints.
    """
    if (location / MANIFEST).exists():
        return [location]
    for folders in ([location], [location / "checkpoints"], sorted(location.glob("*/checkpoints"))):
        found = [path for folder in folders for path in checkpoints(folder)]
        if found:
            return found
    raise ValueError(f"{location} holds no checkpoints: give a run directory, a stage's, or a step_… folder")


def listing(paths: Iterable[Path]) -> str:
    """Format one line per checkpoint: samples seen, time, what wrote it, size, held-out loss."""
    rows = [["checkpoint", "samples", "written", "by", "size", "held-out loss", ""]]
    for path in paths:
        try:
            problems = checkpoint.find_problems(path, checksums=False)
            manifest = {} if problems else read_manifest(path)
        except OSError as error:
            rows.append(
                [str(path), f"{samples_of(path)}", "", "", "", "", f"can't be read now: {describe_os_error(error)}"]
            )
            continue
        if problems:
            rows.append([str(path), f"{samples_of(path)}", "", "", "", "", f"DAMAGED: {problems[0]}"])
            continue
        meta, loss = manifest["meta"], manifest["meta"].get("held_out_loss")
        rows.append(
            [
                str(path),
                f"{meta['samples']}",
                _when(meta),
                writer(meta),
                size(_bytes(manifest)),
                "" if loss is None else f"{loss:.4f}",
                "",
            ]
        )
    return aligned(rows, right=(1, 4, 5))


def verification(path: Path) -> tuple[str, bool]:
    """Compare a checkpoint with its checksums; returns a line that describes the result, and whether all are right."""
    try:
        problems = checkpoint.find_problems(path)
        manifest = {} if problems else read_manifest(path)
    except OSError as error:
        return f"{path}: can't be read now, which is no sign of damage: {describe_os_error(error)}", False
    if problems:
        return f"{path}: DAMAGED: {'; '.join(problems)}", False
    return f"{path}: whole, {len(manifest['files'])} files, {size(_bytes(manifest))}, all checksums right", True


def explanation(path: Path) -> str:
    """Format a checkpoint's metadata and contents as tables.

    Raises:
        ValueError: the checkpoint is damaged. The message says how.
    """
    if problems := checkpoint.find_problems(path, checksums=False):
        raise ValueError(f"{path} is damaged: {'; '.join(problems)}")
    manifest = read_manifest(path)
    meta = dict(manifest["meta"])
    health = meta.pop("health", None) or {}
    known = {
        "stage": meta.pop("stage", "?"),
        "samples": f"{meta.pop('samples')} in {meta.pop('steps', '?')} steps",
        "written": f"{_when(meta)} by {writer(meta)}",
        "size": f"{size(_bytes(manifest))} in {len(manifest['files'])} files",
    }
    for name in ("strategy", "world_size", "time"):  # `written` has them.
        meta.pop(name, None)
    others = {name: str(value) for name, value in meta.items() if value not in ("", None)}
    if health.get("skipped") or health.get("rewinds"):
        others["health"] = f"rewound {health['rewinds']} times, {len(health['skipped'])} consecutive steps skipped"
    facts = aligned([[name, value] for name, value in (known | others).items()])
    return f"{path}\n{facts}\n\n{contents(manifest)}"


def contents(manifest: Mapping[str, Any]) -> str:
    """Format a table of the model's parts: how many numbers each part has, and what is stored for each number."""
    parts: dict[str, dict[str, Any]] = {}
    for name, shape in manifest["tensors"].items():
        kind, _, plain = name.partition("/")
        part = parts.setdefault(part_of(kind, plain), {"tensors": set(), "numbers": 0, "bytes": 0, "kinds": []})
        numbers = math.prod(shape)
        part["bytes"] += 4 * numbers
        if plain not in part["tensors"]:
            part["tensors"].add(plain)
            part["numbers"] += numbers
        if kind not in part["kinds"]:
            part["kinds"].append(kind)
    rows = [["part", "tensors", "numbers", "size", "stored"]]
    rows += [
        [name, f"{len(part['tensors'])}", f"{part['numbers']:,}", size(part["bytes"]), ", ".join(part["kinds"])]
        for name, part in sorted(parts.items())
    ]
    total = [sum(part[key] for part in parts.values()) for key in ("numbers", "bytes")]
    rows.append(["all", f"{sum(len(part['tensors']) for part in parts.values())}", f"{total[0]:,}", size(total[1]), ""])
    return aligned(rows, right=(1, 2, 3))


def part_of(kind: str, name: str) -> str:
    """Return the part of the model that a tensor belongs to."""
    if kind in _KINDS_WITHOUT_PARTS:
        return kind
    part = {"dit": "D"}.get(name.partition(".")[0], name.partition(".")[0])
    return f"{part}, LoRA" if ".lora_" in name else part


def writer(meta: Mapping[str, Any]) -> str:
    """Describe the strategy and the number of ranks that wrote a checkpoint."""
    return f"{meta.get('strategy', '?')} on {meta['world_size']} rank{'s' if meta['world_size'] > 1 else ''}"


def _when(meta: Mapping[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(meta["time"])) if "time" in meta else "?"


def _bytes(manifest: Mapping[str, Any]) -> int:
    return sum(entry["bytes"] for entry in manifest["files"].values())
