"""What a run's page shows beside its curves: stages, starts, incidents, sounds, evaluation, config and log."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.dashboard.overview import figures
from launch.error_line import describe_error
from launch.status import logs, table
from launch.status.stage_status import StageStatus
from models.documents import opened, read_bytes
from trainer.file_names import printable_lines
from trainer.recipes.privacy import public_yaml
from trainer.recipes.reading import load_recipe
from trainer.run_documents import Incident, read_optional
from trainer.stages import STAGES

LISTENED = re.compile(r"(?P<stage>[a-z_]+)/samples/step_(?P<samples>\d{1,15})/(?P<clip>[^/]+)\.(?P<kind>[a-z]+)\.flac")
"""Path of a sound that a training left to listen to, in the run's directory."""
_MOST_STEPS = 400  # of a stage's sounds: the newest, and the originals
_LOG_END = 65_536  # bytes
_LOG_LINES = 200


def details(run: Path, stages: Sequence[StageStatus]) -> dict[str, Any]:
    """Return what changes of a run while it goes on, beside its curves."""
    return {
        "stages": [_stage(stage, stages[:number]) for number, stage in enumerate(stages)],
        "starts": [text for stage in stages for text in table.starts(stage)],
        "incidents": [incident for stage in stages for incident in _incidents(stage.folder)],
        "clips": [clip for stage in stages for clip in _clips(run, stage.folder)],
        "evaluation": _evaluation(run),
        "page": (run / "page" / "index.html").is_file(),
    }


def config_text(run: Path) -> str:
    """Return the resolved config of a run without what may be secret, as the listening page shows it."""
    try:
        return public_yaml(load_recipe(str(run / "config.yaml"), []))
    except (ValueError, OSError) as error:
        return describe_error(error)


def log_end(run: Path, stage: str | None) -> dict[str, Any]:
    """Return the last lines of the log of rank 0, or of the newest output of a job, and the file's name."""
    try:
        paths = logs.newest(run, stage, None)
        if not paths:
            return {"file": "", "text": "no log has been written yet"}
        with opened(paths[0]) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _LOG_END))
            lines = file.read(_LOG_END).decode("utf-8", "replace").split("\n")[1 if size > _LOG_END else 0 :]
        text = printable_lines("\n".join(lines[-_LOG_LINES:]).strip("\n"))
        return {"file": str(paths[0].relative_to(run)), "text": text}
    except (ValueError, OSError) as error:
        return {"file": "", "text": describe_error(error)}


def _stage(stage: StageStatus, before: Sequence[StageStatus]) -> dict[str, Any]:
    begun: dict[str, Any] = next((line for line in reversed(stage.history) if "began" in line), {})
    return {
        **figures(stage, before),
        "trained": STAGES[stage.folder.name].trained,
        "job": stage.job.job if stage.job else stage.by_hand,
        "nodes": " ".join(dict.fromkeys(state.nodes for state in stage.living if state.nodes))
        or begun.get("nodes", ""),
        "saved": table.checkpoint_age(stage.folder),
        "remarks": list(table.remarks(stage)),
        "marks": [
            {"samples": line["place"], "text": f"{line['then']}{': ' if line.get('why') else ''}{line.get('why', '')}"}
            for line in stage.history
            if line.get("place") and line.get("then") in ("requeued", "restarted", "over")
        ],
    }


def _incidents(folder: Path) -> list[dict[str, Any]]:
    try:
        found = read_optional(folder / "incident.json", list[Incident], mend="") or []
    except (ValueError, OSError) as error:
        found = [{"what": describe_error(error)}]
    return [{"stage": folder.name, **incident} for incident in found[-_LOG_LINES:]]


def _clips(run: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the sounds of a stage: path, stage, clip, kind (original or decoded) and samples seen."""
    found = []
    for step in _names(folder / "samples"):
        for name in _names(folder / "samples" / step):
            path = f"{folder.name}/samples/{step}/{name}"
            if match := LISTENED.fullmatch(path):
                found.append({**match.groupdict(), "samples": int(match["samples"]), "path": path})
    originals = [clip for clip in found if clip["kind"] == "original"]
    newest = sorted({clip["samples"] for clip in found}, reverse=True)[:_MOST_STEPS]
    return originals + [clip for clip in found if clip["kind"] != "original" and clip["samples"] in newest]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 (names alone are needed)
    except OSError:
        return []


def _evaluation(run: Path) -> str:
    """Return the table of an evaluation; empty if there is none."""
    try:
        return printable_lines(
            read_bytes(run / "evaluate" / "table.txt", mend="", most=1 << 20).decode("utf-8", "replace")
        )
    except (ValueError, OSError):
        return ""
