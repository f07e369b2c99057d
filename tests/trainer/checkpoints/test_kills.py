"""Killed at any moment, again and again, a run comes out as if nobody had touched it."""

from __future__ import annotations

import errno
import io
import os
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from models import disk_errors
from tests.trainer import rank_processes
from tests.trainer.test_loop import losses, tensors
from trainer.checkpoints import checkpoint
from trainer.loop import train
from trainer.recipes.reading import load_recipe

pytestmark = pytest.mark.alone

SAMPLES = 640
RUN = (f"pretrain.samples={SAMPLES}", "log.every=8", "log.samples_every=0", "log.held_out=4", "log.clips=1")
QUICK = ("parallel.threads=1", "parallel.device=cpu", "checkpoint.every=16", *RUN)


def work(rank: int, run_dir: str, prepared: str, *overrides: str) -> None:
    os.setpgrp()  # a kill is of this process alone
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    paths = [f"run_dir={run_dir}", f"data.latents={prepared}/latents", f"data.audio={prepared}/audio"]
    train(load_recipe("tiny", [*paths, *QUICK, *overrides]), "pretrain")


def work_on_failing_disk(rank: int, run_dir: str, prepared: str, told: str, fault: Fault, *overrides: str) -> None:
    """Work as `work` does, while reads of checkpoints fail on one rank; note the error in a file."""
    disk_errors.PAUSES = (0.0,)  # type: ignore[assignment]
    if rank == fault.rank:
        fault.inject()
    try:
        work(rank, run_dir, prepared, *overrides)
    except OSError as error:
        Path(f"{told}_{rank}").write_text(f"{error.errno} {error}")
        raise


@dataclass(frozen=True)
class Fault:
    """A disk that fails from one read of a checkpoint's files on."""

    rank: int
    suffix: str
    number: int
    """The errno."""
    after: int
    """How many reads of such files succeed before."""

    def inject(self) -> None:
        """Let the read fail in this process."""
        left = [self.after]
        for module, name in ((io, "open"), (os, "open")):
            setattr(module, name, partial(self._open, getattr(module, name), left))

    def _open(self, real, left: list[int], file, *arguments, **options):
        if "/checkpoints/step_" in str(file) and str(file).endswith(self.suffix):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(self.number, os.strerror(self.number), str(file))
        return real(file, *arguments, **options)


def meets_a_failing_read(run: Path, prepared: Path, told: Path, fault: Fault, *, world_size: int = 1, overrides=()):
    """Start once; the start stops with a line on each rank, and all checkpoints are left as they were."""
    folder = run / "pretrain/checkpoints"
    before = {path: path.stat().st_ino for path in checkpoint.checkpoints(folder)}
    statuses = rank_processes.run(
        work_on_failing_disk, world_size, str(run), str(prepared), str(told), fault, *overrides
    )
    assert statuses == [1] * world_size, fault
    for rank in range(world_size):
        number, line = Path(f"{told}_{rank}").read_text().split(" ", 1)
        assert int(number) == fault.number, (fault, line)
        assert "\n" not in line
        assert "step_" in line
    assert {path: path.stat().st_ino for path in checkpoint.checkpoints(folder)} == before
    assert not list(folder.glob("damaged_*"))


def save_one(run: Path, prepared: Path, *, world_size: int, overrides) -> None:
    """Start and kill once there is a checkpoint: the ranks killed inside of their first save left none."""
    processes = rank_processes.start(work, world_size, str(run), str(prepared), *overrides)
    while any(process.is_alive() for process in processes) and not saved(run):
        time.sleep(0.0005)
    for process in processes:
        process.kill()
        process.join()
    assert saved(run)


def saved(run: Path) -> list[Path]:
    return checkpoint.checkpoints(run / "pretrain/checkpoints")


def finished(run: Path) -> bool:
    return (run / "pretrain/export/dit.safetensors").exists()


def saves(run: Path) -> set[Path]:
    """Checkpoints that are being written, or were when a rank was killed."""
    return set((run / "pretrain/checkpoints").glob("tmp_step_*"))


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    assert rank_processes.run(work, 1, str(run), str(prepared)) == [0]
    return run


def killed(run: Path, prepared: Path, chance: random.Random, *, inside_a_save: bool, world_size: int, overrides) -> str:
    """Start, and kill after a while, or as soon as a checkpoint is being written; says what was hit."""
    left = saves(run)  # by the ranks before
    processes = rank_processes.start(work, world_size, str(run), str(prepared), *overrides)
    end = time.monotonic() + chance.uniform(0.3, 2.2)
    while any(process.is_alive() for process in processes):
        if inside_a_save and saves(run) - left:
            break
        if not inside_a_save and time.monotonic() > end:
            break
        time.sleep(0.0005)
    saving = bool(saves(run) - left)
    for process in chance.sample(processes, len(processes)):
        process.kill()
        process.join()
    return "save" if saving else "step"


@pytest.mark.slow
def test_fifty_kills_change_nothing(whole, prepared, tmp_path, mutant_counts):
    """Bit for bit, as strategy and world size stay the same."""
    chance, run, hit = random.Random(4), tmp_path / "run", []
    reached = -1
    for number in range(50):
        mutant_counts.begin("kills")
        if number % 10 == 9:
            if not saved(run):  # on a slow machine all kills may have come before the first save was done
                save_one(run, prepared, world_size=1, overrides=())
            suffix = chance.choice((".safetensors", "manifest.json"))
            fault = Fault(0, suffix, chance.choice((errno.EIO, errno.EACCES)), chance.randrange(4))
            meets_a_failing_read(run, prepared, tmp_path / f"told_{number}", fault)
        hit.append(killed(run, prepared, chance, inside_a_save=number % 3 == 0, world_size=1, overrides=()))
        newest = checkpoint.newest(run / "pretrain/checkpoints")
        if newest is not None:
            assert checkpoint.find_problems(newest) == []
            assert checkpoint.samples_of(newest) >= reached  # nothing that was whole is lost
            reached = checkpoint.samples_of(newest)
        if finished(run) and number < 49:  # more kills than the run is long: once more from where it was half-way
            (run / "pretrain/export/dit.safetensors").unlink()
            for path in checkpoint.checkpoints(run / "pretrain/checkpoints")[1:]:
                checkpoint.discard([path])
            reached = -1
        mutant_counts.end("kills", refused=False)
    assert hit.count("save") >= 5, hit
    assert hit.count("step") >= 5, hit
    assert rank_processes.run(work, 1, str(run), str(prepared)) == [0]
    ours, theirs = (tensors(path / f"pretrain/checkpoints/step_{SAMPLES:012d}") for path in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(run) == losses(whole)
    assert not list((run / "pretrain/checkpoints").glob("tmp_*"))


def test_kills_with_another_strategy_and_world_size_each_time(whole, prepared, tmp_path):
    chance, run = random.Random(5), tmp_path / "run"
    ways = [("ddp", 2), ("fsdp2", 2), ("ddp", 1), ("fsdp2", 1)]
    for number in range(12):
        strategy, world_size = ways[number % len(ways)]
        overrides = (f"parallel.strategy={strategy}",)
        killed(run, prepared, chance, inside_a_save=True, world_size=world_size, overrides=overrides)
        if number in (4, 9):
            save_one(run, prepared, world_size=world_size, overrides=overrides)
            fault = Fault(number % 2, ".safetensors", (errno.EIO, errno.EACCES)[number % 2], chance.randrange(2))
            told = tmp_path / f"told_{number}"
            meets_a_failing_read(run, prepared, told, fault, world_size=2, overrides=overrides)
    assert rank_processes.run(work, 2, str(run), str(prepared), "parallel.strategy=fsdp2") == [0, 0]
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
