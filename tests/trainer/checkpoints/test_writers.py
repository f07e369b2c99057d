"""Ranks that own little share files: few files, the same numbers, and no rank that waits for one that failed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.trainer import rank_processes
from tests.trainer.checkpoints.test_checkpoint import META, blank, message_of, same, state, uneven_ranges
from trainer.checkpoints import checkpoint, writers
from trainer.checkpoints.manifest import read_manifest
from trainer.checkpoints.writers import LEAST_BYTES, joined, spans_of, writer_of
from trainer.ranks.flat_ranges import FlatRange, equal_ranges, split_among_copies, whole_ranges


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64, 100, 1024])
@pytest.mark.parametrize("size", [0, 1, LEAST_BYTES - 4, 3 * LEAST_BYTES, 20 * LEAST_BYTES, 10**5 * LEAST_BYTES])
def test_files_are_few_and_written_by_the_first_of_neighbours(ranks, size):
    of_ranks = [writer_of(rank, ranks=ranks, numbers=size // 4) for rank in range(ranks)]
    files = sorted(set(of_ranks))
    assert len(files) == min(ranks, max(1, size // LEAST_BYTES))
    assert of_ranks == [max(file for file in files if file <= rank) for rank in range(ranks)]
    counts = [of_ranks.count(file) for file in files]
    assert max(counts) - min(counts) <= 1


def test_ranges_that_follow_on_each_other_are_one():
    assert joined([{"a": (0, 3)}, {"a": (3, 5), "b": (0, 2)}, {"b": (2, 4)}]) == [{"a": (0, 5), "b": (0, 4)}]
    assert joined([{}, {"a": (2, 3)}, {}]) == [{"a": (2, 3)}]
    assert joined([]) == []


def test_ranges_with_a_gap_between_them_take_another_file():
    assert joined([{"a": (0, 3), "b": (0, 1)}, {"a": (4, 5), "b": (1, 2)}]) == [
        {"a": (0, 3), "b": (0, 2)},
        {"a": (4, 5)},
    ]
    assert joined([{"a": (4, 5)}, {"a": (0, 4)}]) == [{"a": (4, 5)}, {"a": (0, 4)}]


@pytest.mark.parametrize(("copies", "shards"), [(1, 4), (2, 4), (3, 5), (8, 1)])
def test_neighbours_of_a_sharded_copy_write_one_range(copies, shards):
    """As under HSDP: `copies` groups of ranks hold the same tensors, of which each rank of a group holds some rows."""
    shapes = {"a": (11, 7), "b": (3,), "c": (64, 2), "d": ()}
    of_ranks = []
    for copy in range(copies):
        for shard in range(shards):
            held = {}
            for name, shape in shapes.items():
                rows, row = (shape[0] if shape else 1), math.prod(shape[1:])
                start, stop = (
                    min(rows, shard * -(-rows // shards) + more * -(-rows // shards)) * row for more in (0, 1)
                )
                held[name] = FlatRange(torch.zeros(stop - start), shape, start)
            of_ranks.append(spans_of(split_among_copies(held, index=copy, copies=copies)))
        assert len(joined(of_ranks[-shards:])) == 1
    for name, shape in shapes.items():
        spans = sorted(spans[name] for spans in of_ranks if name in spans)
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
        assert spans[-1][1] == math.prod(shape)


def three_ranks(rank: int, root: str) -> None:
    """Save in one file, in two, and in one a rank; then one rank has no memory for its group's ranges."""
    dist.init_process_group("gloo")
    directory, size = Path(root), 4 * sum(value.numel() for value in state().values())
    parts = equal_ranges(state(), rank=rank, world_size=3)
    for files in (1, 2, 3):
        writers.LEAST_BYTES = size // files
        checkpoint.save(directory / str(files), 8, parts, META)
    empty = {name: FlatRange(torch.zeros(0), part.shape) for name, part in parts.items()}
    uneven = uneven_ranges(state(), rank // 2) if rank != 1 else empty
    writers.LEAST_BYTES = size
    checkpoint.save(directory / "uneven", 8, uneven, META)

    def no_memory(*_: object) -> list:
        raise RuntimeError("can't allocate memory")

    if rank == 0:
        writers._allocated = no_memory
    told = message_of(checkpoint.save, directory / "full", 8, parts, META)
    (directory / f"told_{rank}").write_text(told)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("three_ranks")
    assert rank_processes.run(three_ranks, 3, str(directory)) == [0, 0, 0]
    return directory


@pytest.mark.parametrize(("how", "files"), [("1", [0]), ("2", [0, 2]), ("3", [0, 1, 2]), ("uneven", [0])])
def test_three_ranks_save_in_few_files(saved, how, files):
    path, tensors = saved / how / "step_000000000008", blank()
    assert sorted(read_manifest(path)["files"]) == [f"rank_{number:05d}.safetensors" for number in files]
    assert checkpoint.find_problems(path) == []
    assert read_manifest(path)["meta"]["world_size"] == 3
    checkpoint.load(path, whole_ranges(tensors))
    assert same(tensors, state())


def test_too_little_memory_on_a_writer_ends_the_save_on_all_ranks(saved):
    told = {(saved / f"told_{rank}").read_text() for rank in range(3)}
    assert len(told) == 1
    assert "rank 0: " in next(iter(told))
    assert "can't allocate memory" in next(iter(told))
    assert list((saved / "full").iterdir()) == []
