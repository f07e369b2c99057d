"""The section of `gpu.py` that counts how often the host waits for the device in real steps of the loop."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from gpu_cases import Case, NotAvailable, Row, Setting
from gpu_training import STAGE, TEXT, recipe, take_step, training

STEPS, WARM = 2, 4
BATCH = 8
VARIANTS = {
    "steps, eager": ("parallel.compile=false",),
    "steps that write a line of the log, eager": ("parallel.compile=false", f"log.every={BATCH}"),
    "steps, compiled": ("parallel.compile=true",),
    "steps, graph": ("parallel.compile=false", "parallel.graph=true"),
    "steps, eager, fsdp2": ("parallel.compile=false", "parallel.strategy=fsdp2"),
}


def cases(setting: Setting) -> Mapping[str, Case]:
    """Return a case for each kind of step."""
    return {name: lambda row, name=name: _count(row, name, setting) for name in VARIANTS}


def _count(row: Row, name: str, setting: Setting) -> None:
    batch = (f"{STAGE}.global_batch={BATCH}", "parallel.precision=bf16", "parallel.micro_batch=4")
    with training(setting, recipe(setting, name, *batch, *TEXT[True], *VARIANTS[name])) as prepared:
        for _ in range(WARM):
            take_step(prepared)
        if setting.device != "cuda":
            raise NotAvailable("a host waits for a GPU alone")
        torch.cuda.synchronize()
        torch.set_warn_always(True)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(STEPS):
                    take_step(prepared)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in told if "synchroniz" in str(one.message))
        where = "\n".join(f"{count} × {place}" for place, count in places.most_common()) + "\n"
        row(name, steps=STEPS, waits=places.total(), **({"places": where} if places else {}))
