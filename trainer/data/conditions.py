"""Conditions of D that the stream reads from the sets, beside the latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from numpy import int64
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.shard_set import DamagedSample, ShardSet

Note = Callable[[int, DamagedSample], None]
"""Called with the id of a sample whose condition is damaged, and what is wrong with it."""


class ConditionReader(ABC):
    """Reads one condition of a batch's samples; its tensors reach D under the names that `blank` gives them."""

    @abstractmethod
    def found_in(self, sets: Sequence[ShardSet]) -> bool:
        """Whether any of the sets holds the condition.

        Raises:
            ValueError: what the sets hold does not fit D; names the mend.
        """

    @abstractmethod
    def blank(self, size: int) -> dict[str, Tensor]:
        """The condition of so many samples that have none: tensors of `size` rows by D's argument names."""

    @abstractmethod
    def fill(
        self,
        into: Mapping[str, Tensor],
        shard_set: ShardSet,
        *,
        ids: NDArray[int64],
        rows: NDArray[int64],
        positions: NDArray[int64],
        note: Note,
    ) -> None:
        """Read the condition of some samples into rows of what `blank` gave.

        Args:
            into: the batch's tensors.
            shard_set: the set that the samples are from.
            ids: (n,), the samples' places in the set.
            rows: (n,), the rows of the batch that they take.
            positions: (n,), the samples' places in the stream, by which a condition is dropped at random.
            note: told of each sample whose condition is damaged, which then has none.
        """
