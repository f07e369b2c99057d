"""`spresso profile`: asks a running training for a trace of some steps, and waits for it.

Importing this module needs no torch.
"""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path

from launch.status.run_stages import ask_the_queue, shown, stages_of
from launch.status.stage_status import StageStatus
from trainer.log.trace_request import (
    TraceRequest,
    read_request,
    remove_request,
    table_beside,
    traces,
    write_request,
)
from trainer.progress import Progress
from trainer.stages import STAGES

_PAUSE = 0.5  # seconds between two looks at the request
_ALIVE = 30.0  # seconds between two looks at whether the stage still trains, which may ask SLURM
_PATIENCE = 10.0  # seconds until a file that another machine wrote is visible here


def profile(run: Path, *, steps: int) -> str:
    """Ask the stage that trains now for a trace; return the table of its costliest kernels, and its path.

    Args:
        run: directory of the run.
        steps: number of steps to trace.

    Raises:
        ValueError: no stage of the run trains, another trace is asked for already, or none was written.
    """
    stage = _training_stage(run, steps)
    _require_no_other(stage)
    before = {path: _identity(path) for path in traces(stage)}
    write_request(stage, TraceRequest(steps=steps, asked=time.time()))
    print(f"asked {stage.name} for {steps} step(s); it begins with its next line of the log", file=sys.stderr)
    try:
        _wait(run, stage, steps)
    except BaseException:
        remove_request(stage)
        raise
    trace = _written(stage, before)
    return f"{table_beside(trace).read_text()}\nthe trace, to open on https://ui.perfetto.dev: {shown(trace)}"


def _training_stage(run: Path, steps: int) -> Path:
    """Return the directory of the stage that trains now. Raises ValueError if there is none."""
    found = [stage for stage in stages_of(run) if STAGES[stage.folder.name].trained]
    ask_the_queue(found)  # without an answer, the state follows from the stages' directories
    running = [stage.folder for stage in found if stage.runs]
    if not running:
        raise ValueError(
            f"no stage of {shown(run)} trains now: `spresso run RECIPE log.profile_steps={steps}` traces a new run"
        )
    return running[-1]


def _require_no_other(stage: Path) -> None:
    """Raise ValueError if a trace of the stage is asked for already."""
    other = read_request(stage)
    if other is not None:
        since = datetime.fromtimestamp(other.asked).astimezone().isoformat(" ", "seconds")
        raise ValueError(f"a trace of {shown(stage)} is asked for already, since {since}: wait until it is written")


def _wait(run: Path, stage: Path, steps: int) -> None:
    """Wait until the training has removed the request. Raises ValueError if it ends before."""
    looked = time.monotonic()
    with Progress(f"{stage.name}: trace", total=steps, unit="steps") as progress:
        while (request := read_request(stage)) is not None:
            if request.traced is not None:
                progress.to(request.traced)
            if time.monotonic() - looked > _ALIVE:
                looked = time.monotonic()
                _require_training(run, stage)
            time.sleep(_PAUSE)
        progress.to(steps)


def _require_training(run: Path, stage: Path) -> None:
    status = next((each for each in stages_of(run) if each.folder == stage), StageStatus(stage, None))
    ask_the_queue([status])
    if not status.runs:
        raise ValueError(f"{shown(stage)} is {status.state}, and no trace was made: ask again once it trains")


def _written(stage: Path, before: dict[Path, tuple[int, int]]) -> Path:
    """Return the trace that was written since `before`. Raises ValueError if there is none."""
    until = time.monotonic() + _PATIENCE
    while True:
        new = [path for path in traces(stage) if before.get(path) != _identity(path)]
        if new:
            return new[-1]
        if time.monotonic() > until:
            raise ValueError(
                f"{shown(stage)} wrote no trace: it ended before, or the trace failed; see `spresso logs "
                f"{shown(stage.parent)}`"
            )
        time.sleep(_PAUSE)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
