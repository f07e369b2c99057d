"""Real supervisors whose ranks train, on this machine and without SLURM: one dies at the worst moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from launch import owner
from launch.slurm.attempt import TOKEN, Attempt, history
from launch.slurm.variables import GRACE, RUN, SUPERVISORS
from tests.trainer.rank_processes import free_port
from tests.trainer.test_loop import losses, tensors

ROOT = Path(__file__).parents[3]
SETTINGS = (
    *("pretrain.samples=96", "pretrain.global_batch=8", "checkpoint.every=32", "checkpoint.keep_last=9"),
    *("log.every=8", "log.held_out=16", "log.samples_every=0", "log.clips=1", "parallel.micro_batch=2"),
    *("parallel.threads=1", "parallel.device=cpu", "log.trackers=[]"),
)
Train = Callable[[str], Path]


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    """The process of which supervisors are forked."""
    words = [sys.executable, "-m", "tests.launch.slurm.supervised", "train"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, **pipes, text=True, cwd=ROOT, env=environment) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def train(nursery, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Trains on two ranks, of which one dies during something, and returns the run directory."""
    supervisors: list[int] = []

    def trained(dies: str) -> Path:
        folder = tmp_path_factory.mktemp(f"dies_{dies}")
        run, marks = folder / "run", folder / "marks"
        marks.mkdir()
        attempt = Attempt(run / "pretrain", "12", 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(TOKEN, "")
            owner.take(attempt.stage_folder, owner.by_job(attempt))
        environment = {
            **{RUN: str(run), "MARKS": str(marks), "DIES": dies, TOKEN: attempt.token, GRACE: "30"},
            **{SUPERVISORS: str(free_port()), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())},
            **{"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "12", "SLURM_NODEID": "0"},
        }
        paths = (f"run_dir={run}", f"data.latents={prepared}/latents", f"data.audio={prepared}/audio")
        for rank in range(2):
            asked = {"environment": environment, "ranks": [rank, 2, 9], "settings": [*paths, *SETTINGS]}
            print(json.dumps(asked), file=nursery.stdin, flush=True)
            supervisors.append(int(nursery.stdout.readline()))
        assert [_status(marks / f"{rank}.status") for rank in range(2)] == [0, 0]
        return run

    yield trained
    for pid in supervisors:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _status(path: Path) -> int:
    """Wait until a supervisor has ended, and return its exit status."""
    end = time.monotonic() + 240
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    return int(path.read_text())


@pytest.fixture(scope="module")
def whole(train: Train) -> Path:
    """A run of which no rank died."""
    return train("")


@pytest.mark.parametrize("during", ["save", "evaluation"])
def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_ends_as_without_the_death(train, whole, during):
    run = train(during)
    [restart] = [entry for entry in history(run / "pretrain") if "then" in entry]
    assert (restart["then"], restart["place"]) == ("restarted", 32)
    assert restart["why"] == "rank 1 was killed by SIGKILL"
    kept = sorted(path.name for path in (run / "pretrain/checkpoints").iterdir())
    assert kept == [f"step_{samples:012d}" for samples in (32, 64, 96)]  # and nothing of the save that was cut off
    assert losses(run) == losses(whole)
    assert [entry for entry in history(whole / "pretrain") if "then" in entry] == []
    last = f"pretrain/checkpoints/step_{96:012d}"
    ours, theirs = tensors(run / last), tensors(whole / last)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
