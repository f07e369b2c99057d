"""Short runs of the product's whole loop, with its saver, for the last sections of `gpu.py`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_cases import Setting
from gpu_training import STAGE, TEXT, random_weights, recipe

from trainer.checkpoints.names import checkpoints
from trainer.log.metrics import read_metrics
from trainer.loop import train
from trainer.recipes.schema import Config
from trainer.stop import Stop

BATCH, STEPS, SAVED_EVERY = 8, 12, 4


class StopAt(Stop):
    """Asks to stop in the step that brings a run to a number of steps in all."""

    def __init__(self, steps: int) -> None:
        self.steps, self.begun = steps, 0

    def before_step(self, samples: int) -> None:
        self.begun = samples // BATCH + 1

    def __call__(self) -> bool:
        return self.begun >= self.steps


class KillAt(StopAt):
    """Kills the process in the step that brings a run to a number of steps, or in a later one with a checkpoint."""

    def __init__(self, steps: int, folder: Path) -> None:
        super().__init__(steps)
        self.folder = folder

    def __call__(self) -> bool:
        if super().__call__() and checkpoints(self.folder):
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def short_recipe(setting: Setting, name: str, *overrides: str) -> Config:
    """Return the recipe of a run that logs each step and saves every few steps."""
    cadence = (f"log.every={BATCH}", f"checkpoint.every={SAVED_EVERY * BATCH}", f"{STAGE}.global_batch={BATCH}")
    precision = ("parallel.precision=bf16", "parallel.compile=false")
    return recipe(setting, name, *cadence, *precision, *TEXT[False], *overrides)


def train_short(setting: Setting, config: Config, stop: Stop | None = None) -> None:
    """Train for `STEPS` steps, or until `stop` asks; the run is stopped, not done, so that nothing is exported."""
    with random_weights(setting):
        train(config, STAGE, stop=stop or StopAt(STEPS))


def losses(config: Config) -> dict[int, float]:
    """Return the loss of each line of the log, by the samples seen."""
    return {line["samples"]: line["loss"] for line in lines(config)}


def lines(config: Config) -> list[dict[str, Any]]:
    """Return the lines of the log that training wrote."""
    found = read_metrics(Path(config.run_dir) / STAGE / "metrics.jsonl")
    return [line for line in found if line["kind"] == "train"]


def furthest(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """Return the largest relative difference of two curves at the steps that both have."""
    return max(abs(ours[at] - theirs[at]) / abs(theirs[at]) for at in ours.keys() & theirs.keys())


def start(function: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Fork a process that calls a function; this process must not have used the device yet."""
    process = multiprocessing.get_context("fork").Process(target=_call, args=(function, *arguments))
    process.start()
    return process


def ended(process: multiprocessing.process.BaseProcess) -> int | None:
    """Wait for a process, and return its exit status: 0 if it went well, -9 if it was killed."""
    process.join()
    return process.exitcode


def require_success(what: str, *processes: multiprocessing.process.BaseProcess) -> None:
    """Wait for processes, and raise RuntimeError unless all of them succeeded."""
    statuses = [ended(process) for process in processes]
    if any(statuses):
        raise RuntimeError(f"{what} ended with the statuses {statuses}; their output is above in the log")


def _call(function: Callable[..., None], *arguments: Any) -> None:
    status = 1
    try:
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # threads of process groups would hold up a regular end
