"""The state of sweeps: a line for each shared stage and each point, or one line for a whole sweep. Needs no torch."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launch import owner
from launch.slurm.scheduler import ENDED_STATES
from launch.status.run_stages import ask_the_queue, shown, stages_of
from launch.status.stage_status import StageStatus, count
from launch.sweep import outcomes
from launch.sweep.outcomes import Outcome
from launch.sweep.record import Record, is_sweep, read
from models.readable import describe_os_error
from trainer.formatting import aligned
from trainer.stages import STAGES

__all__ = ["SweepStatus", "is_sweep", "overview", "report", "run_directories"]

_WIDTH = 120
_INDENT = " " * 14
_ENDED = {state.lower() for state in ENDED_STATES - {"COMPLETED", "PREEMPTED"}}
_BAD = {"failed", "died", "no export", "gone", *_ENDED}
_TO_COME = {"pending", "requeued", "submitted"}
"""States of a stage whose job waits as far as its directory says, where SLURM gives no answer."""


@dataclass
class SweepPart:
    """A point or a shared stage."""

    name: str
    folder: Path
    stages: list[StageStatus]
    """The stages in its own directory that have begun or were submitted, in order."""
    outcome: Outcome | None
    """How it ended last on this machine."""
    shares: bool
    """Whether it is a shared stage, which has neither an evaluation nor a page."""

    @cached_property
    def current(self) -> StageStatus | None:
        """The stage that runs, or else the first one that is not done, or else the last one."""
        running = [stage for stage in self.stages if stage.runs]
        undone = [stage for stage in self.stages if stage.state != "done"]
        return next(iter([*running, *undone, *reversed(self.stages)]), None)

    @cached_property
    def holder(self) -> owner.Owner | None:
        """The living process that runs it on this machine."""
        return owner.at_work(self.folder)

    @cached_property
    def state(self) -> str:
        """State in one word."""
        states = {stage.state for stage in self.stages}
        if self.holder is not None or "running" in states or self._may_run:
            return "running"
        if any(stage.living for stage in self.stages):
            return "pending"
        if self._is_whole and not states - {"done"}:
            return "done"
        if self.outcome is not None and self.outcome["outcome"] in (outcomes.FAILED, outcomes.STOPPED):
            return self.outcome["outcome"]
        if states & _BAD:
            return "failed"
        return "pending" if not states or states & _TO_COME else "stopped"

    @property
    def _may_run(self) -> bool:
        """Whether a stage claims to run, and nothing has told since that the part has ended."""
        ended = self.outcome["time"] if self.outcome is not None else 0.0
        return any(stage.state == "running?" and stage.spoke > ended for stage in self.stages)

    @property
    def _is_whole(self) -> bool:
        """Whether what it makes last is there."""
        if self.shares:
            sets = [self.folder / "latents" / split / "set.json" for split in ("train", "test")]
            return bool(self.stages) or all(path.is_file() for path in sets)
        page, config = self.folder / "page" / "index.html", self.folder / "config.yaml"
        return page.is_file() and config.is_file() and page.stat().st_mtime_ns >= config.stat().st_mtime_ns

    @property
    def row(self) -> tuple[str, ...]:
        """The row of the table."""
        stage, runs = self.current, self.state == "running"
        job = f"pid {self.holder.pid}" if self.holder else stage.job.job if stage is not None and stage.job else ""
        if stage is None or self.state == "done":
            return (f"  {self.name}", job if runs else "", self.state, "", "", "", self._loss)
        nodes = " ".join(dict.fromkeys(state.nodes for state in stage.living if state.nodes))
        seen, of = stage.status.get("samples"), stage.status.get("of")
        samples = f"{count(seen)} of {count(of)}" if of and seen is not None else ""
        return (f"  {self.name}", job, self.state, self._doing(stage), nodes, samples, self._loss)

    def _doing(self, stage: StageStatus) -> str:
        """Return the name of the stage at which it is: those that train nothing leave no status on this machine."""
        order = list(STAGES)
        later = order[order.index(stage.folder.name) + 1 :] if stage.state == "done" else []
        return next((name for name in reversed(later) if (self.folder / name).is_dir()), stage.folder.name)

    @property
    def _loss(self) -> str:
        losses = [stage.line["loss"] for stage in self.stages if isinstance(stage.line.get("loss"), int | float)]
        return f"{losses[-1]:.4f}" if losses else ""

    def remarks(self) -> Iterator[str]:
        """Yield why it failed, and how often it was requeued."""
        if self.state == "failed":
            whys = [
                line.get("why", "") for stage in self.stages for line in stage.of_this_job if line.get("then") == "over"
            ]
            why = whys[-1] if whys else self.outcome.get("why", "") if self.outcome else ""
            if why:
                yield f"{self.name}: {why}"
        elif requeued := sum(line.get("then") == "requeued" for stage in self.stages for line in stage.of_this_job):
            yield f"{self.name}: requeued {'once' if requeued == 1 else f'{requeued} times'}"


_HEADER = ("shared stage, point", "job", "state", "stage", "nodes", "samples", "loss")
_RIGHT = (5, 6)


@dataclass
class SweepStatus:
    """A sweep, of which the jobs' states are filled in once its stages have been handed to SLURM's query."""

    folder: Path
    shared: list[SweepPart]
    points: list[SweepPart]
    problem: str = ""
    """Why its record can't be read."""

    @property
    def open_stages(self) -> list[StageStatus]:
        """The stages whose jobs may be in the queue."""
        return [stage for part in (*self.shared, *self.points) for stage in part.stages if not stage.over]

    @property
    def summary(self) -> str:
        """How many points are done, in one line."""
        if self.problem:
            return self.problem
        counted = Counter(point.state for point in self.points)
        told = [f"{counted[state]} {state}" for state in ("running", "pending", "stopped", "failed") if counted[state]]
        done = f"{counted['done']} of {len(self.points)} points done"
        return f"{shown(self.folder)}, a sweep: {', '.join([done, *told])}"


Read = Callable[[Path], list[StageStatus]]
Ask = Callable[[Sequence[StageStatus]], str]


def report(folder: Path, *, read: Read | None = None, ask: Ask | None = None) -> str:
    """Return the table of a sweep. Raises ValueError if its record is damaged.

    Args:
        folder: directory of the sweep.
        read: what returns the stages of a run; None: `stages_of`.
        ask: what fills in the states of jobs; None: `ask_the_queue`.
    """
    sweep = _status(folder, read or stages_of)
    problem = (ask or ask_the_queue)(sweep.open_stages)
    parts = (*sweep.shared, *sweep.points)
    lines = [sweep.summary, aligned([_HEADER, *(part.row for part in parts)], right=_RIGHT)]
    for part in parts:
        for text in part.remarks():
            lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent=_INDENT, break_on_hyphens=False)
    return "\n".join([*lines, *([problem] if problem else [])])


def overview(read: Read | None = None) -> list[SweepStatus]:
    """Return the sweeps under runs/ and at most two levels below the current folder; `read` as for `report`."""
    patterns = ("[!.]*/sweep.json", "[!.]*/[!.]*/sweep.json")
    found = []
    for folder in sorted({path.parent for pattern in patterns for path in Path().glob(pattern)}):
        try:
            found.append(_status(folder, read or stages_of))
        except (ValueError, OSError) as error:
            problem = describe_os_error(error) if isinstance(error, OSError) else str(error)
            found.append(SweepStatus(folder, [], [], problem))
    return found


def run_directories(folder: Path) -> list[Path]:
    """Return the run directories of a sweep, those of shared stages first. Raises ValueError if it is damaged."""
    record = _require(folder)
    shared = dict.fromkeys(place for place, _ in record.shared if not place.startswith("points/"))
    return [folder / place for place in (*shared, *(point.folder for point in record.points))]


def _require(folder: Path) -> Record:
    record = read(folder)
    if record is None:
        raise ValueError(f"{folder} has no sweep.json: give the directory of a sweep")
    return record


def _status(folder: Path, read_stages: Read) -> SweepStatus:
    """Read a sweep. Raises ValueError if its record is damaged."""
    record, ended = _require(folder), outcomes.latest(folder)

    def part(place: str, name: str, *, shares: bool) -> SweepPart:
        ours = [stage for stage in read_stages(folder / place) if not stage.folder.is_symlink()]
        return SweepPart(name, folder / place, ours, ended.get(place), shares)

    places = [path.relative_to(folder).as_posix() for path in run_directories(folder)]
    shared = [part(place, place, shares=True) for place in places if place.startswith("shared/")]
    return SweepStatus(folder, shared, [part(point.folder, point.name, shares=False) for point in record.points])
