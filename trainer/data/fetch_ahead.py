"""Prefetches remote shards in the order in which the stream will read them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from trainer.data.shard_set import ShardSet

Needs = dict[tuple[ShardSet, int], int]
"""(set, shard) → the shard's bytes, for all shards that one step reads."""

_STEPS = 256  # the maximum number of steps to plan ahead, even if their shards fit in the share


class FetchAhead:
    """Fetches, in threads, the shards of the next steps, as many as fit in a share of the cache.

    Args:
        needs: the needs of each step from the first one on, without end.
        share: the bytes of the cache that the shards of the current and the coming steps may fill.
        fetchers: the number of shards fetched at the same time.
    """

    def __init__(self, needs: Iterator[Needs], *, share: int, fetchers: int):
        self._needs, self._share = needs, share
        self._planned: deque[Needs] = deque()
        self._last_need: dict[tuple[ShardSet, int], int] = {}
        self._bytes = 0
        self._first = 0  # the number of the first step in `_planned`
        self._pool = ThreadPoolExecutor(fetchers, "fetch")

    def to(self, step: int) -> None:
        """Release the shards of all steps before `step`, and plan the fetching of at least `step`.

        Each call must be for the same step as the last call, or a later one.
        """
        while self._planned and self._first < step:
            for key, size in self._planned.popleft().items():
                if self._last_need[key] == self._first:
                    del self._last_need[key]
                    self._bytes -= size
            self._first += 1
        while not self._planned or (self._bytes < self._share and len(self._planned) < _STEPS):
            self._plan(next(self._needs))

    def _plan(self, needs: Needs) -> None:
        for (shard_set, shard), size in needs.items():
            if (shard_set, shard) not in self._last_need:
                self._bytes += size
                self._pool.submit(shard_set.fetch, shard)  # the shard's reader meets and reports any error
            self._last_need[shard_set, shard] = self._first + len(self._planned)
        self._planned.append(needs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
