"""Whether the export of a done stage is still there. This module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoints.names import checkpoints


def missing_export(folder: Path, status: Mapping[str, Any]) -> str:
    """Return a line on the export that a done stage should have, with the mend; empty if nothing is missing of it.

    Args:
        folder: the stage's directory.
        status: its `status.json`; that of an older run does not list the files, of which one must be there.
    """
    if status.get("state") != "done" or "export" not in status:
        return ""
    export = folder / "export"
    lacking = [name for name in status.get("files", ()) if not (export / name).is_file()]
    if not lacking and any(export.glob("*.safetensors")):
        return ""
    what = f"{export / lacking[0]} is gone" if lacking and export.is_dir() else f"its export {export} is gone"
    if checkpoints(folder / "checkpoints"):
        return f"{what}: run {folder.name} again, which makes it from the last checkpoint, or put it back"
    return f"{what}, and there is no checkpoint to make it from: put it back, or remove {folder} to train it again"
