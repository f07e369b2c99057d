"""Ranks that hang end with their stacks in their logs; ranks that are slow are named."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest

from tests.trainer import rank_processes
from tests.trainer.test_loop import PRETRAIN
from trainer.data.stream import LatentStream
from trainer.log.metrics import read_metrics
from trainer.loop import train
from trainer.ranks.parallel import Parallel
from trainer.ranks.watchdog import Watchdog, prepare_nccl
from trainer.recipes.reading import load_recipe
from trainer.run_directory import RunDirectory

pytestmark = pytest.mark.alone


def work(rank: int, run_dir: str, prepared: str, held_up: float, *overrides: str) -> None:
    """Rank 1 gets each batch after the third late."""
    plain = LatentStream.iterate

    def hold_up(*arguments, **options):
        for number, batch in enumerate(plain(*arguments, **options)):
            if rank == 1 and number >= 3:
                time.sleep(held_up)
            yield batch

    LatentStream.iterate = hold_up
    paths = [f"run_dir={run_dir}", f"data.latents={prepared}/latents", f"data.audio={prepared}/audio"]
    train(load_recipe("tiny", [*paths, "parallel.threads=1", "parallel.device=cpu", *PRETRAIN, *overrides]), "pretrain")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_rank_that_hangs_ends_all_of_them_and_every_log_tells_where(prepared, tmp_path, strategy):
    start = time.monotonic()
    overrides = ("health.hang_seconds=2", f"parallel.strategy={strategy}")
    statuses = rank_processes.run(work, 2, str(tmp_path), str(prepared), 10_000.0, *overrides)
    assert statuses == [1, 1]
    assert time.monotonic() - start < 60
    logs = [(tmp_path / f"pretrain/logs/rank_{rank}.log").read_text() for rank in range(2)]
    assert "Timeout (0:00:02" in logs[1]
    # rank 0's own clock ends it at the same time, unless the end of its peer does, which has a traceback, too
    assert "Timeout (0:00:02" in logs[0] or "Connection closed by peer" in logs[0]
    for log in logs:
        assert "most recent call" in log
        assert "loop.py" in log
    assert "in hold_up" in logs[1]
    assert "in hold_up" not in logs[0]
    assert {"ddp": "in backward", "fsdp2": "in forward"}[strategy] in logs[0]  # where it waits for rank 1
    assert RunDirectory(tmp_path / "pretrain", "pretrain").status["state"] == "running"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_slow_rank_is_named(prepared, tmp_path, strategy):
    overrides = ("log.every=32", f"parallel.strategy={strategy}")
    assert rank_processes.run(work, 2, str(tmp_path), str(prepared), 0.3, *overrides) == [0, 0]
    lines = [line for line in read_metrics(tmp_path / "pretrain/metrics.jsonl") if line["kind"] == "train"]
    assert len(lines) == 3
    for line in lines[1:]:
        [slow] = line["slow_ranks"]
        assert slow["rank"] == 1
        assert slow["data_wait"] > 0.2
        low, median, high = line["data_wait_seconds"]
        assert low <= median <= high
        assert high > 0.2 > low
        assert line["step_seconds"][0] > 0.2  # all of them wait for it
    assert "rank 1 on " in (tmp_path / "pretrain/logs/rank_0.log").read_text()


def sleep_watched(rank: int, log: str) -> None:
    with Watchdog(Path(log), 0.2) as watchdog:
        watchdog.beat()
        with watchdog.allow_longer():
            time.sleep(0.6)
        for _ in range(60):
            time.sleep(0.01)
            watchdog.beat()
    time.sleep(0.5)
    with Watchdog(Path(log), 0.0):
        time.sleep(0.5)


def test_it_is_patient_where_it_ought_to_be(tmp_path):
    assert rank_processes.run(sleep_watched, 1, str(tmp_path / "log")) == [0]
    assert (tmp_path / "log").read_text() == ""


def test_nccl_records_its_collectives_and_waits_for_the_watchdog(monkeypatch):
    environment: dict[str, str] = {}
    monkeypatch.setattr("trainer.ranks.watchdog.os.environ", environment)
    prepare_nccl(600)
    assert int(environment["TORCH_FR_BUFFER_SIZE"]) > 0
    first_step = 6 * 600
    assert int(environment["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > first_step
    environment["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] = "50"
    prepare_nccl(600)
    assert environment["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "50"


def test_a_rank_may_open_as_many_files_as_it_can():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        Parallel(load_recipe("tiny", ["parallel.device=cpu"]).parallel)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
