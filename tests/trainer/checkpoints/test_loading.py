"""Ranks that want the same tensors read a checkpoint once together; the bits stay, and a failure reaches all."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.trainer import rank_processes
from tests.trainer.checkpoints.test_checkpoint import META, message_of, state
from trainer.checkpoints import checkpoint
from trainer.ranks import whole_tensors
from trainer.ranks.flat_ranges import FlatRange, equal_ranges, whole_ranges

FILES, RANKS = 6, 3


class Opened(Counter):
    """Counts the files of checkpoints that this process opens, and the bytes that it reads of their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, plain_open, plain_read = 0, Path.open, checkpoint.load.__globals__["RankFile"].read

        def opened(path: Path, *arguments: Any, **options: Any) -> Any:
            self[path.name] += 1
            return plain_open(path, *arguments, **options)

        def read(file: Any, name: str, start: int, stop: int) -> torch.Tensor:
            self.bytes += 4 * (stop - start)
            return plain_read(file, name, start, stop)

        Path.open, checkpoint.load.__globals__["RankFile"].read = opened, read  # type: ignore[method-assign]


def bits() -> dict[str, torch.Tensor]:
    """Numbers of all kinds: NaNs with a payload, infinities, negative zero, subnormal ones."""
    odd = torch.tensor([0x7FC00001, 0x7F800001, -(2**31), 1, 0x7F800000, 0x00400000], dtype=torch.int32)
    return state() | {"odd": odd.view(torch.float32), "large": torch.randn(1000, generator=torch.Generator())}


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(-1).view(torch.int32), b.view(-1).view(torch.int32))


def three_ranks(rank: int, root: str) -> None:
    dist.init_process_group("gloo")
    path, expected, results = Path(root) / "step_000000000008", bits(), {}
    whole_tensors._BUCKET = 100  # many rounds, which end within tensors
    opened = Opened()

    tensors = {name: torch.zeros_like(value) for name, value in expected.items()}
    results["meta"] = checkpoint.load(path, whole_ranges(tensors))
    results["whole"] = all(equal_bits(tensors[name], expected[name]) for name in expected)
    results["opened"], results["bytes"] = dict(opened), opened.bytes

    # as under FSDP: the rows of one tensor on each rank, all others whole
    rows = torch.zeros(400)
    mine = FlatRange(rows[: 400 if rank < 2 else 200], (1000,), 400 * rank)
    tensors = {name: torch.zeros_like(value) for name, value in expected.items() if name != "large"}
    opened.bytes = 0
    checkpoint.load(path, whole_ranges(tensors) | {"large": mine})
    results["mixed"] = all(equal_bits(tensors[name], expected[name]) for name in tensors)
    results["rows"] = equal_bits(mine.data, expected["large"][400 * rank : mine.stop])
    results["bytes of mixed"] = opened.bytes

    # rank 1 can't read a file that the others need not read
    if rank == 1:
        plain = Path.open

        def failing(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == "rank_00002.safetensors":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return plain(path, *arguments, **options)

        Path.open = failing  # type: ignore[method-assign, assignment]
    results["failed"] = message_of(
        checkpoint.load, path, whole_ranges({n: torch.zeros_like(v) for n, v in bits().items()})
    )
    (Path(root) / f"results_{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> list[dict]:
    """What three ranks say of loading a checkpoint of six files."""
    directory, tensors = tmp_path_factory.mktemp("loading"), bits()
    path = checkpoint.save(directory, 8, whole_ranges(tensors), META)
    entries: dict[str, Any] = {}
    for rank in range(FILES):
        parts = equal_ranges(tensors, rank=rank, world_size=FILES)
        file = path / f"rank_{rank:05d}.safetensors"
        ranges = {name: [part.start, part.stop] for name, part in parts.items() if part.data.numel()}
        entries[file.name] = {**checkpoint._write(file, {name: parts[name] for name in ranges}), "ranges": ranges}
    document = checkpoint.read_manifest(path) | {"files": entries}
    (path / "manifest.json").write_text(checkpoint.signed(document))
    assert checkpoint.find_problems(path) == []
    assert rank_processes.run(three_ranks, RANKS, str(directory)) == [0] * RANKS
    return [json.loads((directory / f"results_{rank}.json").read_text()) for rank in range(RANKS)]


def test_every_rank_gets_every_bit(loaded):
    for results in loaded:
        assert results["whole"]
        assert results["mixed"]
        assert results["rows"]
        assert results["meta"]["samples"] == 8


def test_the_ranks_open_each_file_once_together_and_read_each_byte_once(loaded):
    opened = [results["opened"] for results in loaded]
    manifests = [files.pop("manifest.json", 0) for files in opened]
    assert manifests[1:] == [0, 0]
    assert sorted(name for files in opened for name in files) == [
        f"rank_{rank:05d}.safetensors" for rank in range(FILES)
    ]
    assert {count for files in opened for count in files.values()} == {2}  # once for the header, once for the numbers
    total = 4 * sum(value.numel() for value in bits().values())
    assert sum(results["bytes"] for results in loaded) == sum(results["bytes of mixed"] for results in loaded) == total


def test_a_failed_read_of_a_share_reaches_every_rank(loaded):
    assert len({results["failed"] for results in loaded}) == 1
    assert "rank 1: " in loaded[0]["failed"]
    assert "rank 0: " not in loaded[0]["failed"]
    assert "rank_00002.safetensors" in loaded[0]["failed"]
