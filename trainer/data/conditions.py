"""Conditions of D, which the stream reads from the sets together with the latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from numpy import int64
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.shard_set import DamagedSample, ShardSet

Note = Callable[[int, DamagedSample], None]
"""A function that is called with the id of a sample whose condition is damaged, and the problem."""


class ConditionReader(ABC):
    """Reads one condition of a batch's samples; D receives the tensors by the names in `blank`."""

    @abstractmethod
    def found_in(self, sets: Sequence[ShardSet]) -> bool:
        """Whether any of the sets holds the condition.

        Raises:
            ValueError: the condition in the sets does not fit D. The message names the remedy.
        """

    @abstractmethod
    def blank(self, size: int) -> dict[str, Tensor]:
        """Return the condition of `size` samples that lack it: tensors of `size` rows, by D's argument names."""

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
        """Read the condition of n samples of one set into rows of the tensors from `blank`.

        Args:
            into: the batch's tensors.
            shard_set: the set that the samples are from.
            ids: (n,), the samples' indices in the set.
            rows: (n,), the samples' rows in the batch.
            positions: (n,), the samples' positions in the stream, which key the random dropping of a condition.
            note: called for each sample whose condition is damaged; its rows stay blank.
        """
