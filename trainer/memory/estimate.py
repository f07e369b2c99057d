"""What each rank will hold, before a run: a row for every strategy, and the fastest that fits; and what mends a lack.

Weights, gradients, moments and buffers are reckoned from shapes (`ledger`), activations are measured on tensors without
numbers (`activations`). Nothing is allocated, and no GPU is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from trainer.formatting import aligned, size
from trainer.memory.activations import Activations, Pass, activations
from trainer.memory.ledger import ON_DEVICE, Parts, Ranks, Sharing, held
from trainer.memory.outline import outline
from trainer.recipes.schema import Config, ParallelConfig
from trainer.recipes.values import flatten
from trainer.stages import STAGES

GIB = 2**30
SPARE = GIB
"""Of a GPU's memory: its context, libraries' workspaces and NCCL's own buffers."""
USABLE = 0.95
"""Of the rest; what fragmentation leaves."""

_PLAIN: tuple[Sharing, ...] = (
    Sharing("ddp"),
    Sharing("zero1"),
    Sharing("zero2"),
    Sharing("fsdp2"),
    Sharing("fsdp2", shard_base=True),
    Sharing("zero3"),
)
_OFFLOADED: tuple[Sharing, ...] = (
    Sharing("zero2", offload="optimizer"),
    Sharing("zero3", offload="optimizer"),
    Sharing("zero3", offload="all"),
)


def _recomputed(sharings: Iterable[Sharing]) -> tuple[Sharing, ...]:
    return tuple(dataclasses.replace(sharing, checkpoint_activations=True) for sharing in sharings)


SPEED = (*_PLAIN, *_recomputed(_PLAIN), *_OFFLOADED, *_recomputed(_OFFLOADED))
"""The fastest first, by what a step costs on top of the work itself. `ddp` reduces gradients once, behind the backward
pass. `zero1` and `zero2` send the new weights round as well. `fsdp2` brings trained weights together in each pass of
each micro batch, `shard_base` the frozen ones too, and `zero3` both in smaller pieces. Recomputing costs a third more
work, which is more than any traffic on a fast network; offloading waits for PCIe and for a CPU's Adam."""


@dataclass(frozen=True)
class StrategyRow:
    """One way to share the work, and what a rank would hold."""

    sharing: Sharing
    parts: Parts

    def fits(self, total: float) -> bool:
        """Whether it fits a device of so many bytes, with something to spare."""
        return self.parts.total <= USABLE * (total - SPARE)


class Estimate:
    """One stage of a recipe on so many ranks.

    Raises:
        ValueError: the sizes of D or of the AudioAE are in a folder that is missing or damaged.
    """

    def __init__(self, config: Config, stage: str, world_size: int) -> None:
        self.config, self.stage = config, stage
        self.outline = outline(config, stage)
        parallel, batch = config.parallel, config.stage(stage).global_batch
        self.micro = parallel.micro_batch or max(1, batch // world_size)
        self.ranks = Ranks(
            count=world_size,
            replicas=parallel.replicas if world_size % parallel.replicas == 0 else 1,
            precision=parallel.precision,
            accumulated=batch > world_size * self.micro,
            cuda=parallel.device != "cpu",
        )
        self.own = Sharing.of(parallel)
        self._measured = cache(self._measure)

    def row(self, sharing: Sharing) -> StrategyRow:
        """What a rank would hold."""
        parts = held(self.outline, sharing, self.ranks)
        return StrategyRow(sharing, parts.with_activations(self.activations(sharing).peak))

    def rows(self) -> list[StrategyRow]:
        """Every way, the recipe's own among them, the fastest first; blocks are computed again where it says so."""
        own = self.own
        ways = [*_PLAIN, *_OFFLOADED]
        if own.checkpoint_activations:
            ways = [*_recomputed(ways)]
        if own not in ways:
            ways.insert(len(_PLAIN), own)
        return [self.row(sharing) for sharing in ways]

    def fastest(self, total: float) -> StrategyRow | None:
        """The first of `SPEED` that fits a device of so many bytes; None where nothing does."""
        return fastest((self.row(sharing) for sharing in SPEED), total)

    def activations(self, sharing: Sharing) -> Activations:
        """Of one micro batch."""
        lower_trained = sharing.strategy != "ddp" and self.ranks.precision != "fp32"
        return self._measured(lower_trained, sharing.checkpoint_activations)

    def _measure(self, lower_trained: bool, recomputed: bool) -> Activations:
        how = Pass(
            clips=self.micro,
            frames=self.config.stage(self.stage).crop_frames,
            precision=self.ranks.precision,
            lower_trained=lower_trained,
            recomputed=recomputed,
            text=self.config.text.kind != "none" and self.config.stage(self.stage).text_dropout < 1,
            cuda=self.ranks.cuda,
        )
        return activations(self.config, self.stage, self.outline.dit, how)


def fastest(rows: Iterable[StrategyRow], total: float) -> StrategyRow | None:
    """The first row that fits; the rest are not asked for."""
    return next((row for row in rows if row.fits(total)), None)


def gpu_memory(config: ParallelConfig) -> int:
    """Bytes of this machine's smallest GPU, or of the one that the recipe has in mind."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return int(config.gpu_gib * GIB)
    return min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))


@dataclass(frozen=True)
class Change:
    """Something to set, what it costs, and what a rank would hold then."""

    settings: list[str]
    cost: str
    row: StrategyRow


def changes(config: Config, stage: str, world_size: int) -> Iterator[Change]:
    """What could be set to hold less, the cheapest first; of settings that differ in degree, one after another."""
    parallel, now = config.parallel, Estimate(config, stage, world_size)
    yield from _smaller_micro_batches(now)
    if world_size > 1:
        cost = "more traffic between ranks; the same result"
        yield from (Change(_differing(now.own, way), cost, now.row(way)) for way in _slower(now.own, _PLAIN))
    if not parallel.checkpoint_activations:
        way = dataclasses.replace(now.own, checkpoint_activations=True)
        yield Change(_differing(now.own, way), "a third more compute; the same result", now.row(way))
    if parallel.precision == "fp32":
        lower = Estimate(_with_parallel(config, precision="bf16"), stage, world_size)
        yield Change(["parallel.precision=bf16"], "coarser matrix products; faster on a GPU", lower.row(now.own))
    cost = "waits for host memory at each step; the same result"
    yield from (Change(_differing(now.own, way), cost, now.row(way)) for way in _slower(now.own, _OFFLOADED))
    if frames := _shorter_crop(config, stage):
        settings: dict[str, Any] = {stage: dataclasses.replace(config.stage(stage), crop_frames=frames)}
        shorter = Estimate(dataclasses.replace(config, **settings), stage, world_size)
        cost = "shorter context: what is learned changes"
        yield Change([f"{stage}.crop_frames={frames}"], cost, shorter.row(now.own))


def _smaller_micro_batches(now: Estimate) -> Iterator[Change]:
    """Half of it and less. What a clip adds is the same for each, so two sizes are measured."""
    if now.micro == 1:
        return
    single = Estimate(_with_parallel(now.config, micro_batch=1), now.stage, now.ranks.count)
    least, most = single.activations(now.own).peak, now.activations(now.own).peak
    parts = held(now.outline, now.own, single.ranks)
    for clips in range(now.micro // 2, 0, -1):
        if now.micro % clips == 0:
            peak = least + (most - least) * (clips - 1) // (now.micro - 1)
            cost = "more, smaller micro batches to a step; the same result"
            yield Change([f"parallel.micro_batch={clips}"], cost, StrategyRow(now.own, parts.with_activations(peak)))


def _with_parallel(config: Config, **settings: Any) -> Config:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **settings))


def out_of_memory(config: Config, stage: str, world_size: int, peak_bytes: float, total_bytes: float) -> str:
    """What to tell when a device's memory is used up: prediction beside measurement, and the three cheapest changes.

    Args:
        config: the whole recipe.
        stage: the one that ran.
        world_size: its ranks.
        peak_bytes: the most that this rank had allocated.
        total_bytes: the device's memory.
    """
    header = (
        f"out of memory in {stage} on {world_size} rank(s): at most {size(peak_bytes)} were in use, of "
        f"{size(total_bytes)}"
    )
    try:
        estimate = Estimate(config, stage, world_size)
        row = estimate.row(estimate.own)
        # what is predicted too low is so for the changes as well
        unforeseen = max(0.0, peak_bytes - row.parts.total)
        found = cheapest(changes(config, stage, world_size), row, total_bytes - unforeseen)
    except (ValueError, OSError) as error:
        return f"{header}. Lower parallel.micro_batch; what more would do can't be told, because {error}"
    cells = [*ON_DEVICE, "predicted", "measured"]
    sizes = [*(getattr(row.parts, name) for name in ON_DEVICE), row.parts.total, peak_bytes]
    table = aligned([cells, [size(each) for each in sizes]], right=range(len(cells)))
    enough = all(change.row.fits(total_bytes - unforeseen) for change in found)
    lines = [
        header,
        *table.splitlines(),
        "the cheapest changes that would be enough:" if enough else "no one change is enough; these save most:",
        *(
            f"  {' '.join(change.settings)}: {size(change.row.parts.total + unforeseen)}; {change.cost}"
            for change in found
        ),
    ]
    return "\n".join(lines if found else [*lines[:3], "nothing is left to set: use more ranks, or a smaller model"])


def cheapest(candidates: Iterable[Change], now: StrategyRow, total: float, most: int = 3) -> list[Change]:
    """The first few that fit, one of a kind, and no more are asked for; where none does, those that save most."""
    fitting: dict[str, Change] = {}
    saving = []
    for change in candidates:
        if len(fitting) == most:
            break
        if change.row.fits(total):
            fitting.setdefault(change.cost, change)
        elif change.row.parts.total < now.parts.total:
            saving.append(change)
    least: dict[str, Change] = {}
    for change in sorted(saving, key=lambda change: change.row.parts.total):
        least.setdefault(change.cost, change)
    return list((fitting or least).values())[:most]


def _slower(own: Sharing, ways: Iterable[Sharing]) -> Iterator[Sharing]:
    """Those that come after the recipe's own, with its choice of recomputing."""
    for sharing in ways:
        changed = dataclasses.replace(sharing, checkpoint_activations=own.checkpoint_activations)
        if own not in SPEED or SPEED.index(changed) > SPEED.index(own):
            yield changed


def _differing(own: Sharing, other: Sharing) -> list[str]:
    """What to set to get from one to the other."""
    fields = [item.name for item in dataclasses.fields(Sharing)]
    pairs = [(name, getattr(other, name)) for name in fields if getattr(other, name) != getattr(own, name)]
    return [f"parallel.{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in pairs]


def _shorter_crop(config: Config, stage: str) -> int:
    unit = flatten(config)[STAGES[stage].crop_unit]
    return config.stage(stage).crop_frames // 2 // unit * unit
