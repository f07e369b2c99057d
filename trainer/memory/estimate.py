"""Predicts the memory of each rank before a run, finds the fastest strategy that fits, and suggests changes.

Weights, gradients, moments and buffers are computed from shapes (`ledger`); activations are measured on fake tensors
(`activations`). Nothing is allocated, and no GPU is needed.
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
from trainer.recipes.parallel import ParallelConfig
from trainer.recipes.schema import Config
from trainer.recipes.values import flatten
from trainer.stages import STAGES

GIB = 2**30
SPARE = GIB
"""GPU memory that the CUDA context, library workspaces and NCCL buffers take."""
USABLE = 0.95
"""Fraction of the remaining memory that is usable in spite of fragmentation."""

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
"""All sharings, the fastest first, ordered by the overhead of a step. `ddp` reduces gradients once, overlapped with the
backward pass. `zero1` and `zero2` also gather the updated weights. `fsdp2` gathers trained weights in each pass of each
micro batch, `shard_base` frozen weights too, and `zero3` both in smaller pieces. Checkpointing costs a third more
compute, which is more than any communication on a fast network. Offloading waits for PCIe and for Adam on the CPU."""


@dataclass(frozen=True)
class StrategyRow:
    """A sharing and the memory of a rank under it."""

    sharing: Sharing
    parts: Parts

    def fits(self, total: float) -> bool:
        """Whether a rank fits a device of `total` bytes, with a margin."""
        return self.parts.total <= USABLE * (total - SPARE)


class Estimate:
    """The memory of one stage of a recipe on `world_size` ranks.

    Raises:
        ValueError: the folder that holds the sizes of D or of the AudioAE is missing or damaged.
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
            averages=2 if config.stage(stage).ema_profiles else 1,
            graph=parallel.graph,
        )
        self.own = Sharing.of(parallel)
        self._measured = cache(self._measure)

    def row(self, sharing: Sharing) -> StrategyRow:
        """Return the memory of a rank under a sharing."""
        parts = held(self.outline, sharing, self.ranks)
        return StrategyRow(sharing, parts.with_activations(self.activations(sharing).peak))

    def rows(self) -> list[StrategyRow]:
        """Return all sharings that the recipe can have including its own, the fastest first.

        All of them checkpoint activations if the recipe does.
        """
        own = self.own
        ways = self.possible([*_PLAIN, *_OFFLOADED])
        if own.checkpoint_activations:
            ways = [*_recomputed(ways)]
        if own not in ways:
            ways.insert(len(self.possible(_PLAIN)), own)
        return [self.row(sharing) for sharing in ways]

    def fastest(self, total: float) -> StrategyRow | None:
        """Return the first of `SPEED` that fits a device of `total` bytes, or None."""
        return fastest((self.row(sharing) for sharing in self.possible(SPEED)), total)

    def possible(self, sharings: Iterable[Sharing]) -> list[Sharing]:
        """Leave out what the recipe's other settings exclude: a base that is cut if it is in FP8; with CUDA graphs, all
        but DDP with activations that are kept."""
        whole, graph = self.config.parallel.base_precision == "fp8", self.config.parallel.graph
        return [
            sharing
            for sharing in sharings
            if not (whole and sharing.cuts_base) and not (graph and sharing != Sharing("ddp"))
        ]

    def activations(self, sharing: Sharing) -> Activations:
        """Measure the activations of one micro batch; equal settings are measured once."""
        lower_trained = sharing.strategy != "ddp" and self.ranks.precision != "fp32"
        eager = self.config.parallel.compile is False
        kernels = self.ranks.cuda and eager and sharing.strategy != "zero3"
        return self._measured(lower_trained, sharing.checkpoint_activations, kernels)

    def _measure(self, lower_trained: bool, recomputed: bool, kernels: bool) -> Activations:
        how = Pass(
            clips=self.micro,
            frames=self.config.stage(self.stage).crop_frames,
            precision=self.ranks.precision,
            lower_trained=lower_trained,
            recomputed=recomputed,
            text=self.config.text.kind != "none" and self.config.stage(self.stage).text_dropout < 1,
            cuda=self.ranks.cuda,
            kernels=kernels,
        )
        return activations(self.config, self.stage, self.outline.dit, how)


def fastest(rows: Iterable[StrategyRow], total: float) -> StrategyRow | None:
    """Return the first row that fits, or None; later rows are not computed."""
    return next((row for row in rows if row.fits(total)), None)


def gpu_memory(config: ParallelConfig) -> int:
    """Return the bytes of this machine's smallest GPU; without a GPU, those of `parallel.gpu_gib`."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return int(config.gpu_gib * GIB)
    return min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))


@dataclass(frozen=True)
class Change:
    """A change of settings, its cost, and the memory of a rank after it."""

    settings: list[str]
    cost: str
    row: StrategyRow


def changes(config: Config, stage: str, world_size: int) -> Iterator[Change]:
    """Yield changes that may save memory, the cheapest first; gradual settings yield one change for each degree."""
    parallel, now = config.parallel, Estimate(config, stage, world_size)
    yield from _smaller_micro_batches(now)
    if world_size > 1:
        cost = "more traffic between ranks; the same result"
        yield from (Change(_differing(now.own, way), cost, now.row(way)) for way in _slower(now, _PLAIN))
    if parallel.graph:
        without = Estimate(_with_parallel(config, graph=False), stage, world_size)
        cost = "the host launches each kernel; the same result"
        yield Change(["parallel.graph=false"], cost, without.row(now.own))
    if not parallel.checkpoint_activations:
        recomputed = dataclasses.replace(now.own, checkpoint_activations=True)
        cost = "a third more compute; the same result"
        yield from (Change(_differing(now.own, way), cost, now.row(way)) for way in now.possible([recomputed]))
    if parallel.precision == "fp32":
        lower = Estimate(_with_parallel(config, precision="bf16"), stage, world_size)
        yield Change(["parallel.precision=bf16"], "coarser matrix products; faster on a GPU", lower.row(now.own))
    cost = "waits for host memory at each step; the same result"
    yield from (Change(_differing(now.own, way), cost, now.row(way)) for way in _slower(now, _OFFLOADED))
    if frames := _shorter_crop(config, stage):
        settings: dict[str, Any] = {stage: dataclasses.replace(config.stage(stage), crop_frames=frames)}
        shorter = Estimate(dataclasses.replace(config, **settings), stage, world_size)
        cost = "shorter context; the result changes"
        yield Change([f"{stage}.crop_frames={frames}"], cost, shorter.row(now.own))


def _smaller_micro_batches(now: Estimate) -> Iterator[Change]:
    """Yield smaller micro batches. Each clip adds the same amount, so only two sizes are measured."""
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
    """Return the error of a device without memory: prediction, measurement, and the three cheapest changes.

    Args:
        config: the whole recipe.
        stage: the stage that ran.
        world_size: number of ranks of the stage.
        peak_bytes: the most memory that this rank had allocated.
        total_bytes: the device's memory.
    """
    header = f"out of memory in {stage} on {world_size} rank(s): the peak was {size(peak_bytes)} of {size(total_bytes)}"
    try:
        estimate = Estimate(config, stage, world_size)
        row = estimate.row(estimate.own)
        # if the prediction is too low, it is too low by as much for the changes
        unforeseen = max(0.0, peak_bytes - row.parts.total)
        found = cheapest(changes(config, stage, world_size), row, total_bytes - unforeseen)
    except (ValueError, OSError) as error:
        return f"{header}. Lower parallel.micro_batch; other changes can't be estimated, because {error}"
    cells = [*ON_DEVICE, "predicted", "measured"]
    sizes = [*(getattr(row.parts, name) for name in ON_DEVICE), row.parts.total, peak_bytes]
    table = aligned([cells, [size(each) for each in sizes]], right=range(len(cells)))
    enough = all(change.row.fits(total_bytes - unforeseen) for change in found)
    lines = [
        header,
        *table.splitlines(),
        "the cheapest changes, each of which is enough:" if enough else "no single change is enough; these save most:",
        *(
            f"  {' '.join(change.settings)}: {size(change.row.parts.total + unforeseen)}; {change.cost}"
            for change in found
        ),
    ]
    return "\n".join(lines if found else [*lines[:3], "no setting saves memory: use more ranks or a smaller model"])


def cheapest(candidates: Iterable[Change], now: StrategyRow, total: float, most: int = 3) -> list[Change]:
    """Return the first `most` changes that fit, one for each cost; if none fits, return those that save most.

    Candidates after the last returned one are not computed.
    """
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


def _slower(now: Estimate, ways: Iterable[Sharing]) -> Iterator[Sharing]:
    """Yield the possible sharings that are slower than the recipe's, with the recipe's choice of checkpointing."""
    own = now.own
    for sharing in now.possible(ways):
        changed = dataclasses.replace(sharing, checkpoint_activations=own.checkpoint_activations)
        if own not in SPEED or SPEED.index(changed) > SPEED.index(own):
            yield changed


def _differing(own: Sharing, other: Sharing) -> list[str]:
    """Return the settings that turn one sharing into the other, as `key=value`."""
    fields = [item.name for item in dataclasses.fields(Sharing)]
    pairs = [(name, getattr(other, name)) for name in fields if getattr(other, name) != getattr(own, name)]
    return [f"parallel.{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in pairs]


def _shorter_crop(config: Config, stage: str) -> int:
    unit = flatten(config)[STAGES[stage].crop_unit]
    return config.stage(stage).crop_frames // 2 // unit * unit
