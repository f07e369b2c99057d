"""The section of `gpu.py` that kills a run on the card and lets it go on from its checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from gpu_cases import Case, Row, Setting
from gpu_runs import BATCH, STEPS, KillAt, ended, furthest, losses, require_success, short_recipe, start, train_short
from gpu_training import STAGE

AFTERWARDS = {"ddp, killed, resumed under ddp": (), "ddp, killed, resumed under fsdp2": ("parallel.strategy=fsdp2",)}


def cases(setting: Setting) -> Mapping[str, Case]:
    """Return a case for each strategy that goes on."""
    return {name: partial(_measure, name=name, setting=setting) for name in AFTERWARDS}


def _measure(row: Row, name: str, setting: Setting) -> None:
    """Compare the curve of a run that was killed with that of one that nothing interrupted."""
    whole, killed = short_recipe(setting, f"{name} whole"), short_recipe(setting, f"{name} killed")
    resumed = short_recipe(setting, f"{name} killed", *AFTERWARDS[name])
    require_success("the whole run", start(train_short, setting, whole))
    killer = KillAt(STEPS * 3 // 4, Path(killed.run_dir) / STAGE / "checkpoints")
    status = ended(start(train_short, setting, killed, killer))
    if status != -signal.SIGKILL:
        raise RuntimeError(f"the run that had to be killed ended with the status {status}")
    before = losses(killed)
    require_success("the resumed run", start(train_short, setting, resumed))
    ours, theirs = losses(resumed), losses(whole)
    row(
        name,
        **{"killed after steps": max(before) // BATCH, "steps in the end": max(ours) // BATCH},
        **{"largest relative difference": furthest(ours, theirs), "to the bit": "yes" if ours == theirs else "no"},
    )
