"""Computes the bytes of weights, gradients and moments on a rank under each strategy, from the shapes of a stage.

The result is for the first rank, whose shards are never smaller than those of others. The formulas follow the source
code of DDP, FSDP2 and DeepSpeed 0.19; `tests/trainer/memory/test_memory.py` compares them with running strategies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from trainer.memory.outline import Outline
from trainer.ranks.strategy import DTYPES
from trainer.ranks.zero import reduce_bucket
from trainer.recipes.parallel import ParallelConfig

PERSISTENT = 100_000
"""ZeRO-3 also keeps parameters of at most this many elements whole on every rank (DeepSpeed's default)."""
REUSED = 500_000_000
"""Elements that ZeRO-3 gathers only once per micro batch and keeps between forward and backward pass: each is used in
both passes, so that this many lie within DeepSpeed's default reuse distance of 10⁹."""


@dataclass(frozen=True)
class Sharing:
    """The settings under `parallel` that decide which weights and states a rank holds."""

    strategy: str = "ddp"
    shard_base: bool = False
    offload: str = "none"
    checkpoint_activations: bool = False

    @classmethod
    def of(cls, config: ParallelConfig) -> Sharing:
        """Return the settings of a recipe."""
        return cls(*(getattr(config, item.name) for item in dataclasses.fields(cls)))

    @property
    def cuts_base(self) -> bool:
        """Whether the frozen base is sharded among ranks."""
        return self.strategy == "zero3" or self.shard_base

    @property
    def settings(self) -> list[str]:
        """The settings that differ from the defaults as `key=value`; the strategy is always included."""
        flags = [name for name in ("shard_base", "checkpoint_activations") if getattr(self, name)]
        offload = [] if self.offload == "none" else [f"offload={self.offload}"]
        return [
            f"parallel.{each}" for each in (f"strategy={self.strategy}", *offload, *(f"{flag}=true" for flag in flags))
        ]

    @property
    def short(self) -> str:
        """A short label, which does not say whether activations are checkpointed."""
        words = [self.strategy, *(["base cut"] if self.shard_base else [])]
        return " ".join([*words, *([] if self.offload == "none" else [f"offload={self.offload}"])])


@dataclass(frozen=True)
class Parts:
    """Bytes of each kind on the device, and bytes in host memory."""

    base: int = 0
    """Frozen weights, and the models outside the stage's module."""
    trained: int = 0
    """Trained weights: float32 masters, and copies in lower precision if the strategy keeps them."""
    gradients: int = 0
    moments: int = 0
    ema: int = 0
    activations: int = 0
    buffers: int = 0
    """Communication buffers: buckets of gradients, and weights that are gathered temporarily."""
    step: int = 0
    """Temporary memory of the optimizer step, when activations and buffers are already freed."""
    host: int = 0
    """Offloaded states in host memory."""

    def with_activations(self, activations: int) -> Parts:
        """Add activations; what the optimizer step needs beyond them is counted as buffers."""
        buffers = max(self.buffers, self.step - activations)
        return dataclasses.replace(self, activations=activations, buffers=buffers)

    @property
    def total(self) -> int:
        """Bytes on the device if all parts peaked at once, which slightly overestimates the real peak."""
        return sum(getattr(self, name) for name in ON_DEVICE)


ON_DEVICE = ("base", "trained", "gradients", "moments", "ema", "activations", "buffers")


@dataclass(frozen=True)
class Ranks:
    """The properties of a run that decide what a rank holds, in addition to `Sharing`."""

    count: int
    replicas: int
    precision: str
    accumulated: bool
    """Whether a step accumulates gradients over more than one micro batch."""
    cuda: bool
    averages: int = 1
    """How many averages of each trained weight a rank holds."""
    graph: bool = False
    """Whether micro batches are CUDA graphs."""

    @property
    def width(self) -> int:
        """Bytes of an element in the precision of the computation."""
        return DTYPES[self.precision].itemsize


def held(outline: Outline, sharing: Sharing, ranks: Ranks) -> Parts:
    """Compute everything that a rank holds, except activations."""
    formula = {"ddp": _ddp, "zero1": _zero_1_2, "zero2": _zero_1_2, "zero3": _zero_3, "fsdp2": _fsdp2}[sharing.strategy]
    parts = formula(outline, sharing, ranks)
    return dataclasses.replace(parts, base=parts.base + outline.beside)


def _ddp(outline: Outline, sharing: Sharing, ranks: Ranks) -> Parts:
    trained = _numbers(outline.trained.values())
    return Parts(
        base=ranks.width * _numbers(outline.frozen.values()),
        trained=4 * trained,
        gradients=4 * trained,
        moments=8 * trained,
        ema=4 * ranks.averages * trained,
        # The reducer builds its buckets anew once. With CUDA graphs, a pass has all its gradients before it adds them.
        buffers=4 * trained if ranks.count > 1 or ranks.graph else 0,
    )


def _zero_1_2(outline: Outline, sharing: Sharing, ranks: Ranks) -> Parts:
    """ZeRO-1 and 2 flatten matrices and vectors into one group each, padded to equal partitions of even size."""
    width, bucket = ranks.width, reduce_bucket(_numbers(outline.trained.values()))
    groups = [
        _numbers(shape for shape in outline.trained.values() if (len(shape) > 1) == matrices)
        for matrices in (True, False)
    ]
    partitions = [2 * _parts(group, 2 * ranks.count) for group in groups]
    part, owned = sum(partitions), sum(map(min, partitions, groups))
    whole = part * ranks.count
    # gradients stay whole if they are reduced only once, after accumulation or, on a CPU, after the backward pass
    gathering = whole if sharing.strategy == "zero1" and (ranks.accumulated or not ranks.cuda) else 0
    parts = Parts(
        base=width * _numbers(outline.frozen.values()),
        trained=width * whole + 4 * part,
        gradients=width * (part + gathering),
        moments=8 * part,
        ema=4 * ranks.averages * owned,
        # CUDA fills a second bucket while the first is reduced; lower precision needs a float32 copy of a bucket
        buffers=bucket * (width * (2 if ranks.cuda else 1) + (4 if width < 4 else 0)),
        step=4 * part,
    )
    if sharing.offload == "none":
        return parts
    # masters, moments, their gradients, a pinned copy for the transfer back; the averages; accumulated gradients
    host = (4 + 8 + 4 + width) * part + parts.ema + (width * whole if ranks.accumulated else 0)
    return dataclasses.replace(
        parts, trained=width * whole, gradients=width * gathering, moments=0, ema=0, step=0, host=host
    )


def _zero_3(outline: Outline, sharing: Sharing, ranks: Ranks) -> Parts:
    """ZeRO-3 shards each parameter separately, and small ones also stay whole. On one rank a shard is the whole."""
    width, alone = ranks.width, ranks.count == 1
    frozen, trained = ([shape.numel() for shape in each.values()] for each in (outline.frozen, outline.trained))
    cut_frozen, cut_trained = (sum(_parts(size, ranks.count) for size in sizes) for sizes in (frozen, trained))
    kept_frozen, kept_trained = (
        0 if alone else sum(size for size in sizes if size <= PERSISTENT) for sizes in (frozen, trained)
    )
    large = sum(frozen) + sum(trained) - kept_frozen - kept_trained
    gathered = 0 if alone else min(large, REUSED + max(_block_sizes(outline), default=0))
    parts = Parts(
        base=width * (cut_frozen + kept_frozen),
        trained=width * (cut_trained + kept_trained) + 4 * cut_trained,
        gradients=width * cut_trained,
        moments=8 * cut_trained,
        ema=4 * ranks.averages * cut_trained,
        buffers=4 * reduce_bucket(sum(trained)) + width * gathered,
        step=4 * cut_trained if width < 4 else 0,
    )
    if sharing.offload == "none":
        return parts
    # masters, moments, averages, gradients of the masters, and gradients in the lower precision
    host = (4 + 8 + 4 + width) * cut_trained + parts.ema
    on_device = dataclasses.replace(
        parts, trained=parts.trained - 4 * cut_trained, gradients=0, moments=0, ema=0, step=0
    )
    if sharing.offload == "optimizer":
        return dataclasses.replace(on_device, host=host)
    host += width * (cut_frozen + cut_trained)
    return dataclasses.replace(on_device, base=width * kept_frozen, trained=width * kept_trained, host=host)


def _fsdp2(outline: Outline, sharing: Sharing, ranks: Ranks) -> Parts:
    """FSDP2 shards parameters along the first dimension; it gathers block by block."""
    width, shards = ranks.width, ranks.count // ranks.replicas
    trained = _numbers(outline.trained.values())
    cut = sum(_rows(shape, shards) for shape in outline.trained.values())
    frozen = _numbers(outline.frozen.values())
    base = sum(_rows(shape, shards) for shape in outline.frozen.values()) if sharing.shard_base else frozen
    blocks = _block_sizes(outline, trained_only=not sharing.shard_base)
    largest = max(blocks, default=0)
    outside = trained + (frozen if sharing.shard_base else 0) - sum(blocks)
    reduced = max([*_block_sizes(outline, trained_only=True), _outside(outline)])
    # two blocks are gathered while a third arrives; those of a LoRA on a base that is not cut all stay
    gathered = sum(blocks) if frozen and not sharing.shard_base else 3 * largest
    return Parts(
        base=width * base,
        trained=4 * cut,
        gradients=4 * (cut + (trained if ranks.accumulated else 0)),  # unsharded until the last micro batch
        moments=8 * cut,
        ema=4 * ranks.averages * cut,
        # weights outside blocks stay gathered; gradients leave in float32
        buffers=width * (outside + gathered) + (4 + width) * reduced,
    )


def _block_sizes(outline: Outline, *, trained_only: bool = False) -> list[int]:
    shapes = outline.trained if trained_only else outline.trained | outline.frozen
    return [_numbers(shapes[name] for name in block if name in shapes) for block in outline.blocks]


def _outside(outline: Outline) -> int:
    """Return the number of trained elements outside all blocks."""
    return _numbers(outline.trained.values()) - sum(_block_sizes(outline, trained_only=True))


def _numbers(shapes: Iterable[torch.Size]) -> int:
    return sum(shape.numel() for shape in shapes)


def _parts(count: int, parts: int) -> int:
    """Return the size of equal parts of `count` elements, the last one padded."""
    return -(-count // parts)


def _rows(shape: torch.Size, shards: int) -> int:
    return _parts(shape[0], shards) * (shape.numel() // shape[0]) if shape else 1
