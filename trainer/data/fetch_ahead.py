"""Shards are fetched before they are needed, in the order in which the order of samples will need them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from trainer.data.shard_set import ShardSet

Needs = dict[tuple[ShardSet, int], int]
"""(set, shard) → its bytes, of one step."""

_STEPS = 256  # looked ahead at most, where all that is needed fits


class FetchAhead:
    """Fetches in threads what the coming steps need, as far as a share of the cache reaches.

    Args:
        needs: of each step from the first one on, without end.
        share: bytes that what is needed next may take, beside what was needed last.
        fetchers: shards at a time.
    """

    def __init__(self, needs: Iterator[Needs], *, share: int, fetchers: int):
        self._needs, self._share = needs, share
        self._planned: deque[Needs] = deque()
        self._last_need: dict[tuple[ShardSet, int], int] = {}
        self._bytes = 0
        self._first = 0  # the step that `_planned` begins with
        self._pool = ThreadPoolExecutor(fetchers, "fetch")

    def to(self, step: int) -> None:
        """The steps before this one, the one after the last call's, are done; at least this one is fetched next."""
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
                self._pool.submit(shard_set.fetch, shard)  # what goes wrong is told to the one who reads it
            self._last_need[shard_set, shard] = self._first + len(self._planned)
        self._planned.append(needs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
