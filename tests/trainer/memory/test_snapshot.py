"""A GPU's memory is kept when it runs out. torch's functions for that are stood in for: there may be no GPU here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer import failures
from trainer.memory.snapshot import keep_snapshot, memory_history
from trainer.ranks.watchdog import Watchdog

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def calls(monkeypatch) -> list[object]:
    """The calls of torch's functions."""
    made: list[object] = []

    def dump(name: str) -> None:
        made.append(name)
        Path(name).write_bytes(b"snapshot")

    monkeypatch.setattr("torch.cuda.memory._dump_snapshot", dump)
    monkeypatch.setattr(
        "torch.cuda.memory._record_memory_history", lambda enabled, **options: made.append((enabled, options))
    )
    return made


def test_the_history_is_bounded_and_ends_with_the_training(calls):
    recording = memory_history(CUDA, 500)
    recording.__enter__()
    assert calls == [("all", {"context": "alloc", "stacks": "python", "max_entries": 500})]
    recording.__exit__(None, None, None)
    assert calls[1:] == [(None, {})]


def test_nothing_is_recorded_of_a_cpu_or_without_entries(calls, tmp_path):
    with memory_history(CPU, 500), memory_history(CUDA, 0):
        assert keep_snapshot(CPU, tmp_path / "memory.pickle") == ""
    assert calls == []
    assert not list(tmp_path.iterdir())


def test_a_snapshot_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    def failing(name: str) -> None:
        Path(name).write_bytes(b"half")
        raise RuntimeError("CUDA error: device-side assert")

    monkeypatch.setattr("torch.cuda.memory._dump_snapshot", failing)
    assert keep_snapshot(CUDA, tmp_path / "memory.pickle") == ""
    assert "device-side assert" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Failed to CUDA malloc 10485760 bytes")],
    ids=["torch", "nccl"],
)
def test_the_error_names_the_snapshot(calls, tmp_path, monkeypatch, error):
    monkeypatch.setattr(failures, "out_of_memory", lambda *unused: "out of memory: lower parallel.micro_batch")
    parallel = SimpleNamespace(rank=3, world_size=4, device=CUDA, memory=lambda: (1, 2))
    watchdog = Watchdog(tmp_path / "rank_3.log", 0)
    kept = tmp_path / "memory_rank_3.pickle"
    with pytest.raises(ValueError, match=f"^out of memory: lower parallel.micro_batch\n{kept} holds .*/memory_viz$"):  # noqa: SIM117
        with failures.explained_failures(None, "pretrain", parallel, watchdog, logs=tmp_path):  # type: ignore[arg-type]
            raise error
    assert kept.read_bytes() == b"snapshot"
