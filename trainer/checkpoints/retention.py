"""Which checkpoints are kept, in a run directory and on a store. This module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Retention:
    """The rule of `CheckpointConfig`: see its `keep_last`, `keep_best` and `keep_every`."""

    last: int
    best: int = 0
    every: int | None = None

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"at least the last checkpoint must be kept, not the last {self.last}")

    def kept(self, metas: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """Return the samples of the checkpoints to keep.

        Args:
            metas: samples → `meta` of each checkpoint; empty for one that is damaged.

        The newest checkpoint whose `meta` has `good` set is always kept: a diverging run is rewound to it.
        """
        found = sorted(metas)
        good = [samples for samples in found if metas[samples].get("good")]
        rated = [samples for samples in found if metas[samples].get("held_out_loss") is not None]
        rated.sort(key=lambda samples: metas[samples]["held_out_loss"])
        kept = {*found[-self.last :], *good[-1:], *rated[: self.best]}
        if self.every:
            first_of_each = {samples // self.every: samples for samples in reversed(found)}
            kept |= {samples for multiple, samples in first_of_each.items() if multiple > 0}
        return kept
