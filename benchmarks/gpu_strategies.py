"""The section of `gpu.py` with a short run of the real loop under each strategy on one card."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping
from functools import partial
from unittest import mock

from gpu_cases import Case, NotAvailable, Row, Setting
from gpu_runs import BATCH, SAVED_EVERY, furthest, lines, losses, short_recipe, train_short
from gpu_training import STAGE

from trainer.checkpoints.saver import Saver
from trainer.memory.estimate import GIB, Estimate
from trainer.recipes.schema import Config

STRATEGIES = {
    "ddp": (),
    "fsdp2": ("parallel.strategy=fsdp2",),
    "zero1": ("parallel.strategy=zero1",),
    "zero2": ("parallel.strategy=zero2",),
    "zero3": ("parallel.strategy=zero3",),
    "fsdp2, base sharded": ("parallel.strategy=fsdp2", "parallel.shard_base=true"),
    "ddp, 2 micro batches": (f"parallel.micro_batch={BATCH // 2}",),
    "ddp, recomputed": ("parallel.checkpoint_activations=true",),
    "ddp, fp16": ("parallel.precision=fp16",),
    "ddp, graph": ("parallel.graph=true",),
    "ddp, graph, 2 micro batches": ("parallel.graph=true", f"parallel.micro_batch={BATCH // 2}"),
}


def cases(setting: Setting) -> Mapping[str, Case]:
    """Return a case for each strategy; their losses have to agree."""
    return {name: partial(_measure, name=name, setting=setting) for name in STRATEGIES}


def _measure(row: Row, name: str, setting: Setting) -> None:
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise NotAvailable("DeepSpeed is not installed")
    config = short_recipe(setting, name, *STRATEGIES[name])
    stalls: list[float] = []
    save = Saver.save

    def noted(saver: Saver, *arguments: object) -> None:
        stalls.append(saver.waited_seconds)  # of the save before, whose copy is long made
        save(saver, *arguments)  # type: ignore[arg-type]

    with mock.patch.object(Saver, "save", noted):
        train_short(setting, config)
    logged = lines(config)
    quiet = [line for number, line in enumerate(logged) if number > 1 and number % SAVED_EVERY]
    row(
        name,
        **{"ms a step": 1000 * statistics.median(line["step_seconds"][1] for line in quiet)},
        **({} if setting.device == "cpu" else _memory(config, logged[-1]["peak_gib"])),
        **{"a save stalls ms": 1000 * max(stalls), "last loss": logged[-1]["loss"], **_beside_ddp(config, setting)},
    )


def _memory(config: Config, measured: float) -> dict[str, float]:
    estimate = Estimate(config, STAGE, 1)
    planned = estimate.row(estimate.own).parts.total / GIB
    return {"peak GiB": measured, "planned GiB": planned, "peak / plan": measured / planned}


def _beside_ddp(config: Config, setting: Setting) -> dict[str, float]:
    """Return how far the curve is from that of the first case, if that one is there."""
    first = short_recipe(setting, "ddp")
    return {"furthest from ddp": furthest(losses(config), losses(first))} if losses(first) else {}
