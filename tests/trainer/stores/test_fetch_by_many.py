"""Many ranks of one launcher start at once on empty disks: one of each disk fetches, and all go on from the same."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launch import pipeline
from tests.stores import ENVIRONMENT
from tests.trainer import rank_processes
from tests.trainer.stores.test_runs import Asked, losses, require_same_end, stopped_at, whole  # noqa: F401 (a fixture)
from trainer import files
from trainer.checkpoints.names import checkpoints
from trainer.checkpoints.problems import find_problems
from trainer.loop import train
from trainer.stores.fetch import fetch

RANKS = 4


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def fetch_as(rank: int, config: Any, stages: tuple[str, ...], endpoint: str, disk: str) -> None:
    """Fetch as a rank of a torchrun; `disk` is `shared`, `shared without locks` or `own`."""
    os.environ |= {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}
    if disk == "shared without locks":
        fcntl.flock = without_locks
        files._LOOK = 0.01
    if disk == "own":
        config.run_dir = f"{config.run_dir}/{rank}"
    for stage in stages:
        fetch(config, stage, launch=("torchrun a", 0))
    stage = Path(config.run_dir) / stages[-1]
    newest = checkpoints(stage / "checkpoints")[-1]
    assert find_problems(newest) == []
    assert (stage / "metrics.jsonl").exists()
    assert not (stage / "fetching").exists()


def fetched(requests: list[str]) -> Counter[str]:
    """How often each file of a checkpoint or an export was fetched, all of them small enough for one request."""
    names = (re.search(r"GET .*/(\w+/(?:checkpoints|export)/.*safetensors)", request) for request in requests)
    return Counter(name[1] for name in names if name)


@pytest.mark.parametrize("disk", ["shared", "shared without locks", "own"])
def test_each_disk_is_filled_once(s3, on, tmp_path, disk):
    stopped_at(on(s3, "first"), 48)
    before = len(s3.proxy.requests)
    arguments = on(s3, "second"), ("pretrain",), s3.proxy.url, disk
    assert rank_processes.run(fetch_as, RANKS, *arguments, seconds=100) == [0] * RANKS
    counts = fetched(s3.proxy.requests[before:])
    assert set(counts.values()) == {RANKS if disk == "own" else 1}


def test_several_stages_are_fetched_once(s3, on, tmp_path):
    """The first stage is done, and the second one has a checkpoint."""
    assert pipeline.train(on(s3, "first"), "pretrain") == "done"
    fetch(on(s3, "first"), "autoencode")
    assert train(on(s3, "first"), "autoencode", stop=Asked(16)) == "stopped"
    before = len(s3.proxy.requests)
    arguments = on(s3, "second"), ("pretrain", "autoencode"), s3.proxy.url, "shared"
    assert rank_processes.run(fetch_as, RANKS, *arguments, seconds=100) == [0] * RANKS
    counts = fetched(s3.proxy.requests[before:])
    assert {name.split("/")[0] for name in counts} == {"pretrain", "autoencode"}
    assert set(counts.values()) == {1}
    status = json.loads((tmp_path / "second/pretrain/status.json").read_text())
    assert status["state"] == "done"
    assert not (tmp_path / "second/pretrain/checkpoints").exists()


def train_as(rank: int, config: Any, endpoint: str) -> None:
    os.environ |= {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint, "TORCHELASTIC_RUN_ID": "a"}
    assert pipeline.train(config, "pretrain") == "done"


def test_ranks_on_an_empty_disk_go_on_together(s3, on, tmp_path, whole):  # noqa: F811
    stopped_at(on(s3, "first"), 48)
    shutil.rmtree(tmp_path / "first")
    assert rank_processes.run(train_as, 2, on(s3, "second"), s3.proxy.url, seconds=200) == [0, 0]
    assert "resumed from" in (tmp_path / "second/pretrain/logs/rank_0.log").read_text()
    assert dict(losses(tmp_path / "second")) == pytest.approx(dict(losses(whole)), rel=1e-5)


# ---- turns


@pytest.mark.parametrize("has_locks", [True, False])
def test_one_at_a_time_has_the_turn(tmp_path, monkeypatch, has_locks):
    monkeypatch.setattr(files, "_LOOK", 0.001)
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", without_locks)
    inside, most = list[int](), list[int]()

    def work() -> None:
        for _ in range(5):
            with files.long_turn(tmp_path / "lock", seconds=60):
                inside.append(1)
                most.append(len(inside))
                threading.Event().wait(0.001)  # so that another one could come in
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 20
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_turn_of_a_process_that_was_killed_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    monkeypatch.setattr(files, "_LOOK", 0.001)
    monkeypatch.setattr(files, "_STALE", 0.05)
    (tmp_path / "lock.turn").touch()
    with files.long_turn(tmp_path / "lock", seconds=60):
        assert (tmp_path / "lock.turn").exists()


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_turn_that_does_not_come_is_an_error(tmp_path, monkeypatch, has_locks):
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", without_locks)
    with (
        files.long_turn(tmp_path / "lock", seconds=1),
        pytest.raises(ValueError, match=r"another process has held .*lock.* for too long"),
        files.long_turn(tmp_path / "lock", seconds=0),
    ):
        pass
