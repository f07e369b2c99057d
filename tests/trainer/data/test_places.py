from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.data import places as places_module
from trainer.data.index_row import INDEX_ROW
from trainer.data.places import Reads, plan_reads

LENGTH, HEADER = 1000, 512


def index_of(shards: list[int], *, header: int = HEADER) -> NDArray[np.void]:
    """Return an index of samples one after another in their shards, each after a header."""
    rows = np.zeros(len(shards), INDEX_ROW)
    rows["shard"], rows["x0_length"], rows["x0_crc32"] = shards, LENGTH, np.arange(len(shards)) + 2**31
    for shard in set(shards):
        inside = np.flatnonzero(rows["shard"] == shard)
        rows["x0_offset"][inside] = header + (LENGTH + header) * np.arange(len(inside))
    return rows


def plan(index: NDArray[np.void], batches: list[list[int]], *, damaged: tuple[int, ...] = ()) -> list[Reads]:
    """Plan the reads of batches of ids; the samples `damaged` do not fit."""

    def fits(found: Mapping[str, NDArray[np.int64]]) -> NDArray[np.bool]:
        return ~np.isin(found["x0_crc32"], index["x0_crc32"][list(damaged)])

    return plan_reads(
        index,
        np.array([id_ for batch in batches for id_ in batch], np.int64),
        rows=np.array([row for batch in batches for row in range(len(batch))], np.int64),
        batches=np.repeat(np.arange(len(batches)), [len(batch) for batch in batches]),
        count=len(batches),
        fits=fits,
        row_bytes=LENGTH,
    )


def rows(places: places_module.Places) -> list[int]:
    return [start // LENGTH for *_, start, _ in places]


def test_samples_are_planned_in_the_order_of_the_disk():
    index, expected = index_of([0] * 200 + [1] * 200), (0, 30, 250, 390)
    (reads,) = plan(index, [[390, 30, 250, 0]])
    assert not reads.runs
    assert [place[:2] for place in reads.alone] == [(index["shard"][i], index["x0_offset"][i]) for i in expected]
    assert rows(reads.alone) == [3, 1, 2, 0]
    assert {(length, end - start) for _, _, length, _, start, end in reads.alone} == {(LENGTH, LENGTH)}
    assert [place[3] for place in reads.alone] == index["x0_crc32"][list(expected)].tolist()


def test_only_neighbours_in_one_batch_and_shard_are_read_together():
    index = index_of([0] * 4 + [1] * 4)
    first, second, none = plan(index, [[5, 3, 1, 2, 4], [0], []])
    assert [rows(run) for run in first.runs] == [[2, 3, 1], [4, 0]]
    assert rows(first.alone) == []
    assert (rows(second.alone), second.runs) == ([0], [])
    assert (rows(none.alone), none.runs, none.damaged) == ([], [], [])


@pytest.mark.parametrize(("header", "runs"), [(16 << 10, 1), ((16 << 10) + 1, 0)])
def test_a_large_gap_is_skipped(header, runs):
    (reads,) = plan(index_of([0, 0], header=header), [[0, 1]])
    assert len(reads.runs) == runs


def test_a_sample_twice_in_a_batch_is_read_twice():
    (reads,) = plan(index_of([0]), [[0, 0]])
    assert sorted(rows(reads.alone)) == [0, 1]


def test_a_long_run_is_split():
    (reads,) = plan(index_of([0] * 600), [list(range(600))])
    assert [run.columns.shape[1] for run in reads.runs] == [256, 256, 88]


def test_a_damaged_row_of_the_index_is_not_read():
    first, second = plan(index_of([0] * 5), [[0, 1, 2], [4, 3]], damaged=(1, 4))
    assert [rows(run) for run in first.runs] == [[0, 2]]
    assert first.damaged == [1]
    assert (rows(second.alone), second.damaged) == ([1], [0])
