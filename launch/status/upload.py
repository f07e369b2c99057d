"""How far the upload of a stage to its store is, for `spresso status`. Needs no torch."""

from __future__ import annotations

import time
from pathlib import Path

from launch.status.stage_status import span
from trainer.formatting import size
from trainer.run_documents import read_upload


def remark(folder: Path, *, runs: bool) -> str:
    """Return how far the upload of a stage is, in a line; empty if it has none.

    Args:
        folder: the stage's directory.
        runs: whether the stage runs, so that what was on its way still may be.
    """
    try:
        state = read_upload(folder)
    except (ValueError, OSError) as error:
        return str(error)
    if not state:
        return ""
    parts = [f"{state['whole']} is whole there"] if "whole" in state else ["nothing is whole there yet"]
    if "sending" in state and "of" in state:
        words = "is on its way" if runs else "was on its way"
        parts.append(f"{state['sending']} {words}, {size(state.get('sent', 0))} of {size(state['of'])}")
    if "problem" in state:
        parts.append(f"{state['problem']} ({span(time.time() - state['time'])} ago)")
    return f"upload to {state['url']}: {'; '.join(parts)}"
