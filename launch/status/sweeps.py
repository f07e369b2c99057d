"""The state of sweeps: a line for each shared stage and each point, or one line for a whole sweep. Needs no torch."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launch import owner
from launch.status.run_stages import ask_the_queue, shown, stages_of
from launch.status.stage_status import StageStatus, count
from launch.sweep import outcomes
from launch.sweep.outcomes import Outcome
from launch.sweep.record import Record, is_sweep, read
from models.readable import describe_os_error
from trainer.formatting import aligned
from trainer.stages import STAGES

__all__ = ["is_sweep", "overview", "report", "run_directories"]

_WIDTH = 120
_INDENT = " " * 14
_BAD = ("failed", "died", "no export", "cancelled", "gone", "timeout", "node_fail", "out_of_memory")


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
        return "failed" if states & set(_BAD) else "stopped" if states else "pending"

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


def report(folder: Path) -> str:
    """Return the table of a sweep. Raises ValueError if its record is damaged."""
    record = _require(folder)
    shared, points, problem = _parts(folder, record)
    lines = [_summary(folder, points), aligned([_HEADER, *(part.row for part in (*shared, *points))], right=_RIGHT)]
    for part in (*shared, *points):
        for text in part.remarks():
            lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent=_INDENT, break_on_hyphens=False)
    return "\n".join([*lines, *([problem] if problem else [])])


def overview() -> list[str]:
    """Return a line for each sweep under runs/ and at most two levels below the current folder."""
    patterns = ("[!.]*/sweep.json", "[!.]*/[!.]*/sweep.json")
    lines = []
    for folder in sorted({path.parent for pattern in patterns for path in Path().glob(pattern)}):
        try:
            _, points, _ = _parts(folder, _require(folder))
            lines.append(_summary(folder, points))
        except (ValueError, OSError) as error:
            lines.append(describe_os_error(error) if isinstance(error, OSError) else str(error))
    return lines


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


def _parts(folder: Path, record: Record) -> tuple[list[SweepPart], list[SweepPart], str]:
    """Return the shared stages and the points, and why SLURM could not be asked; empty if it was."""
    ended = outcomes.latest(folder)

    def part(place: str, name: str, *, shares: bool) -> SweepPart:
        ours = [stage for stage in stages_of(folder / place) if not stage.folder.is_symlink()]
        return SweepPart(name, folder / place, ours, ended.get(place), shares)

    places = [path.relative_to(folder).as_posix() for path in run_directories(folder)]
    shared = [part(place, place, shares=True) for place in places if place.startswith("shared/")]
    points = [part(point.folder, point.name, shares=False) for point in record.points]
    stages = [stage for each in (*shared, *points) for stage in each.stages if not stage.over]
    return shared, points, ask_the_queue(stages)


def _summary(folder: Path, points: Sequence[SweepPart]) -> str:
    counted = Counter(point.state for point in points)
    told = [f"{counted[state]} {state}" for state in ("running", "pending", "stopped", "failed") if counted[state]]
    done = f"{counted['done']} of {len(points)} points done"
    return f"{shown(folder)}, a sweep: {', '.join([done, *told])}"
