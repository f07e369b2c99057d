"""The section of `gpu.py` on steps of the released size: seconds, MFU, memory against the plan, and kernels."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from functools import partial

import torch
from gpu_cases import Case, Row, Setting
from gpu_training import STAGE, TEXT, peak_gib, recipe, take_step, times, training, utilisation
from torch.profiler import ProfilerActivity, profile

from trainer.log.kernel_table import kernel_costs, kernel_table
from trainer.log.throughput import sample_flops
from trainer.memory.estimate import GIB, Estimate
from trainer.ranks.graphed import Graphed
from trainer.recipes.schema import Config
from trainer.training import Training

VARIANTS = {
    "eager": ("parallel.compile=false",),
    "compiled": ("parallel.compile=true",),
    "fp8 base, compiled": ("parallel.compile=true", "parallel.base_precision=fp8"),
    "graph": ("parallel.compile=false", "parallel.graph=true"),
    "graph of compiled blocks": ("parallel.compile=true", "parallel.graph=true"),
    "fp8 base, eager": ("parallel.compile=false", "parallel.base_precision=fp8"),
}
HOST_BOUND = ("eager", "compiled", "graph", "graph of compiled blocks")
"""What differs at a few clips, where the host is slow."""
SIZES = ((32, False), (4, False), (32, True), (1, False), (8, False), (8, True), (64, False), (64, True))
"""Clips, and whether they have text; the most important first."""
PROFILED = ("eager", "compiled", "graph")
KERNELS = 15


def cases(setting: Setting) -> Mapping[str, Case]:
    """Return the cases: each size with each variant, at 4 clips or fewer without those that only a busy GPU shows."""
    named = {
        f"{count} clips, {'text' if text else 'no text'}, {variant}": (count, text, variant)
        for count, text in (((2, False), (2, True)) if setting.small else SIZES)
        for variant in (HOST_BOUND if count <= 4 and not setting.small else VARIANTS)
    }
    return {name: partial(_measure, name=name, of=of, setting=setting) for name, of in named.items()}


def _measure(row: Row, name: str, of: tuple[int, bool, str], setting: Setting) -> None:
    clips, text, variant = of
    batch = (f"{STAGE}.global_batch={clips}", "parallel.precision=bf16")
    config = recipe(setting, name, *batch, *TEXT[text], *VARIANTS[variant])
    flops = clips * _flops_of_a_clip(config, setting)
    warm, timed = (2, 2) if setting.small else (8, 20)
    with training(setting, config) as prepared:
        first, *_ = times(lambda: take_step(prepared), setting.device, count=warm)
        if setting.device == "cuda" and not config.parallel.graph:  # replays use what was allocated by the recording
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(times(lambda: take_step(prepared), setting.device, count=timed))
        figures = {
            "ms a step": 1000 * seconds,
            "clips/s": clips / seconds,
            **utilisation(flops, seconds, setting.device),
            **_recorded(prepared),
        }
        measured = peak_gib(setting.device)
        planned = _planned_gib(config, text=text)
        memory = {} if measured is None else {"peak GiB": measured, "peak / plan": measured / planned}
        row(name, **figures, **memory, **{"planned GiB": planned, "first step s": first})
        if variant in PROFILED and clips <= 32:
            _profile(row, f"{name}, profiled", prepared, setting)


def _recorded(prepared: Training) -> dict[str, str]:
    """Return how many shapes of micro batches are CUDA graphs, as a shape that memory is missing for runs without."""
    if not isinstance(prepared.strategy, Graphed):
        return {}
    found = prepared.strategy.graphs.recorded.values()
    return {"shapes recorded": f"{sum(each is not None for each in found)} of {len(found)}"}


def _flops_of_a_clip(config: Config, setting: Setting) -> int:
    """Return a clip's FLOPs, which are counted once for all cases, as it takes seconds."""
    kept = setting.folder / "flops.json"
    if not kept.exists():
        kept.write_text(json.dumps(sample_flops(config, STAGE)))
    return int(json.loads(kept.read_text()))


def _planned_gib(config: Config, *, text: bool) -> float:
    """Return what the product plans for one rank; that a set holds text is known to the plan from `text.kind`."""
    config.text.kind = "files" if text else "none"
    estimate = Estimate(config, STAGE, 1)
    return estimate.row(estimate.own).parts.total / GIB


def _profile(row: Row, name: str, prepared: Training, setting: Setting) -> None:
    """Add a row with the number of kernels of a step, how long the device is at work, and the costliest of them."""
    steps, on_device = 2, setting.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            take_step(prepared)
        if on_device:
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    costs = kernel_costs(averages, on_device=on_device)
    busy = sum(cost for cost, _ in costs)
    table = kernel_table(averages, steps=steps, on_device=on_device, kernels=KERNELS)
    count = sum(entry.count for _, entry in costs) / steps
    row(name, **{"kernels a step": count, "ms of kernels a step": busy / steps / 1000, "costliest": table})
