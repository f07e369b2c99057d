"""The memory of each rank in `spresso plan`: a table for each trained stage, with a row for each strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from launch.rank_count import ranks_of
from trainer.formatting import aligned, size
from trainer.memory.activations import Activations
from trainer.memory.estimate import GIB, Estimate, StrategyRow, gpu_memory
from trainer.memory.ledger import ON_DEVICE
from trainer.ranks.strategy import DTYPES
from trainer.recipes.schema import Config
from trainer.stages import STAGES

_HEADER = (
    "",
    "strategy",
    "base",
    "trained",
    "gradients",
    "moments",
    "EMA",
    "activations",
    "buffers",
    "sum",
    "host",
    "",
)


def memory(config: Config) -> Iterator[str]:
    """Yield the lines of one section for each trained stage of the recipe."""
    for stage in config.stages:
        if not STAGES[stage].trained:
            continue
        yield f"# memory: {stage}"
        if config.stage(stage).samples == 0:
            yield from (f"{stage}.samples=0: not trained by gradient", "")
            continue
        try:
            ranks, micro = ranks_of(config, stage)
            here = dataclasses.replace(config.parallel, processes=ranks, micro_batch=micro)
            estimate = Estimate(dataclasses.replace(config, parallel=here), stage, ranks)
        except (ValueError, OSError) as error:
            yield from (f"left out, because the sizes of the models are unknown: {error}", "")
            continue
        yield from (*_stage(estimate, gpu_memory(config.parallel)), "")


def _stage(estimate: Estimate, total: int) -> Iterator[str]:
    rows = estimate.rows()
    own = next(row for row in rows if row.sharing == estimate.own)
    unit, name = (GIB, "GiB") if max(row.parts.total for row in rows) >= GIB else (2**20, "MiB")
    ranks, frames = estimate.ranks, estimate.config.stage(estimate.stage).crop_frames
    yield (
        f"{name} on each of {ranks.count} rank(s), for micro batches of {estimate.micro} clips of {frames} frames in "
        f"{ranks.precision}; > marks this recipe's strategy"
    )
    cells = [_cells(row, unit, own=row is own, fits=row.fits(total)) for row in rows]
    yield aligned([_HEADER, *cells], right=range(2, 11))
    yield _verdict(estimate, own, total)
    yield f"activations of a micro batch between forward and backward: {_groups(estimate.activations(own.sharing))}"


def _cells(row: StrategyRow, unit: int, *, own: bool, fits: bool) -> list[str]:
    numbers = [getattr(row.parts, part) for part in ON_DEVICE]
    shown = [f"{number / unit:.2f}" for number in (*numbers, row.parts.total, row.parts.host)]
    return [">" if own else "", row.sharing.short, *shown, "fits" if fits else "too much"]


def _verdict(estimate: Estimate, own: StrategyRow, total: int) -> str:
    row = estimate.fastest(total)
    of = f"{total / GIB:.1f} GiB"
    if row is None:
        return f"no strategy fits {of}: lower parallel.micro_batch or {estimate.stage}.crop_frames, or use more ranks"
    if row.sharing == own.sharing:
        return f"the fastest that fits {of} is this recipe's"
    return f"the fastest that fits {of}: {' '.join(row.sharing.settings)} ({size(row.parts.total)})"


def _groups(activations: Activations) -> str:
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    groups = [
        f"{count} × {shape} {dtypes.get(dtype, str(dtype).removeprefix('torch.'))}: {size(taken)}"
        for count, (shape, dtype), taken in activations.largest()
    ]
    return f"{size(activations.saved)}\n  " + "\n  ".join(groups)
