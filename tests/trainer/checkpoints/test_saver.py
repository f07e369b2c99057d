"""Saving beside training: a copy is what is saved, failures reach every rank, one save at a time."""

from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.trainer import rank_processes
from tests.trainer.checkpoints.test_checkpoint import META, blank, same, small_disk, state
from trainer.checkpoints import checkpoint, writers
from trainer.checkpoints import saver as saver_module
from trainer.checkpoints.saver import Saver
from trainer.ranks.flat_ranges import equal_ranges, whole_ranges
from trainer.recipes.schema import CheckpointConfig


@pytest.fixture
def slow(monkeypatch):
    """Writing waits until it is let go."""
    gate, plain = threading.Event(), checkpoint._write

    def write(*arguments):
        assert gate.wait(30)
        return plain(*arguments)

    monkeypatch.setattr(checkpoint, "_write", write)
    return gate


def load(path: Path) -> dict[str, torch.Tensor]:
    tensors = blank()
    checkpoint.load(path, whole_ranges(tensors))
    return tensors


def test_what_training_changes_after_a_save_is_not_in_it(tmp_path, slow):
    tensors = state(0)
    with Saver(tmp_path, CheckpointConfig()) as saver:
        saver.save(8, whole_ranges(tensors), META)
        saver.wait_for_copy()
        for tensor in tensors.values():
            tensor.fill_(-1)
        assert checkpoint.checkpoints(tmp_path) == []  # training goes on, nothing is written yet
        slow.set()
    assert same(load(tmp_path / "step_000000000008"), state(0))


def test_a_copy_that_takes_long_is_waited_for(tmp_path, monkeypatch):
    gate, tensors, plain = threading.Event(), state(0), saver_module._HostMemory.copy

    def late(*arguments):
        assert gate.wait(30)
        return plain(*arguments)

    monkeypatch.setattr(saver_module._HostMemory, "copy", late)
    with Saver(tmp_path, CheckpointConfig()) as saver:
        saver.save(8, whole_ranges(tensors), META)
        assert saver.waited_seconds < 0.1
        threading.Timer(0.3, gate.set).start()
        saver.wait_for_copy()
        assert saver.waited_seconds > 0.2
        for tensor in tensors.values():
            tensor.fill_(-1)
    assert same(load(tmp_path / "step_000000000008"), state(0))


def test_one_save_waits_for_the_one_before(tmp_path, slow):
    with Saver(tmp_path, CheckpointConfig(keep_last=2)) as saver:
        saver.save(8, whole_ranges(state(0)), META)
        threading.Timer(0.3, slow.set).start()
        start = time.perf_counter()
        saver.save(16, whole_ranges(state(1)), META)
        assert time.perf_counter() - start > 0.25
        assert saver.waited_seconds > 0.25
        saver.save(24, whole_ranges(state(2)), META)
    assert [checkpoint.samples_of(path) for path in checkpoint.checkpoints(tmp_path)] == [16, 24]
    assert same(load(tmp_path / "step_000000000016"), state(1))
    assert same(load(tmp_path / "step_000000000024"), state(2))


def test_a_failed_save_is_told_once_and_the_next_may_succeed(tmp_path):
    with Saver(tmp_path, CheckpointConfig()) as saver:
        saver.save(8, whole_ranges(state(0)), META)
        saver.wait()
        with small_disk():
            saver.save(16, whole_ranges(state(1)), META)
            while not saver.failed:
                time.sleep(0.01)
        with pytest.raises(OSError, match=r"could not save .*untouched"):
            saver.wait()
        assert not saver.failed
        saver.save(24, whole_ranges(state(2)), META)
    assert [checkpoint.samples_of(path) for path in checkpoint.checkpoints(tmp_path)] == [8, 24]


def test_a_failing_run_lets_the_save_under_way_end(tmp_path, slow):
    threading.Timer(0.3, slow.set).start()
    saver = Saver(tmp_path, CheckpointConfig())
    saver.save(8, whole_ranges(state(0)), META)
    saver.__exit__(KeyError, KeyError(), None)
    assert same(load(tmp_path / "step_000000000008"), state(0))


def two_ranks(rank: int, root: str) -> None:
    """Training's own collectives go on meanwhile, in other numbers on each save; then rank 1 finds the disk full."""
    dist.init_process_group("gloo")
    writers.LEAST_BYTES = 1  # so that each rank writes a file
    tensors, directory = state(0), Path(root)
    with Saver(directory / "good", CheckpointConfig(keep_last=9)) as saver:
        for samples in range(8, 48, 8):
            for tensor in tensors.values():
                tensor.fill_(samples)
            saver.save(samples, equal_ranges(tensors, rank=rank, world_size=2), META)
            saver.wait_for_copy()
            for number in range(samples):
                total = torch.tensor([float(number)])
                dist.all_reduce(total)
                assert total.item() == 2 * number
    problem = ""
    try:
        with Saver(directory / "full", CheckpointConfig()) as saver, small_disk(256 if rank == 1 else -1):
            saver.save(8, equal_ranges(tensors, rank=rank, world_size=2), META)
            saver.wait()
    except OSError as error:
        problem = str(error)
    problems = [problem]

    # no memory for the copy on one rank; a deletion that fails where only one rank deletes
    plain = saver_module._HostMemory.copy
    if rank == 1:
        saver_module._HostMemory.copy = fail
    try:
        with Saver(directory / "memory", CheckpointConfig()) as saver:
            saver.save(8, equal_ranges(tensors, rank=rank, world_size=2), META)
    except OSError as error:
        problems.append(str(error))
    saver_module._HostMemory.copy = plain
    checkpoint.shutil.rmtree = fail
    with Saver(directory / "kept", CheckpointConfig(keep_last=1)) as saver:
        for samples in (8, 16):
            saver.save(samples, equal_ranges(tensors, rank=rank, world_size=2), META)
    (directory / f"rank_{rank}.json").write_text(json.dumps(problems))


def fail(*_: object, **__: object) -> None:
    raise OSError(errno.ENOMEM, "not here")


def test_two_ranks_save_beside_their_own_collectives_and_fail_alike(tmp_path):
    assert rank_processes.run(two_ranks, 2, str(tmp_path)) == [0, 0]
    for samples in range(8, 48, 8):
        loaded = load(tmp_path / f"good/step_{samples:012d}")
        assert all((tensor == samples).all() for tensor in loaded.values())
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert first == second
    full, memory = first
    assert full.startswith("could not save")
    assert "rank 1: " in full
    assert "rank 1: " in memory
    assert "not here" in memory
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "kept")] == ["step_000000000016"]
