"""What runs, where, how far: from the run directories and the queue. Answers without torch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from launch import owner, queue
from launch.attempt import history
from launch.batch import place
from launch.jobs import Submitted, submitted
from trainer.text import aligned

_STAGES = ("synth", "prepare", "pretrain", "autoencode", "quantize", "finetune", "evaluate", "page")
_TAIL = 65_536  # bytes of a metrics.jsonl: the last lines are in them, however long it is
_HEADER = ("run", "stage", "job", "state", "nodes", "samples", "of", "per s", "loss", "saved", "starts", "ready", "")


@dataclass
class Stage:
    """A stage of a run that was begun or handed over."""

    folder: Path
    job: Submitted | None
    states: list[queue.JobState] = field(default_factory=list)

    @property
    def status(self) -> dict[str, Any]:
        """What the training says of itself."""
        return _read(self.folder / "status.json")

    @property
    def ended(self) -> list[dict[str, Any]]:
        """What became of its starts."""
        return [entry for entry in history(self.folder) if "then" in entry]

    @property
    def state(self) -> str:
        """In a word or two: of its job, or of what is known without one."""
        told = self.status.get("state")
        if self.states:
            kinds = sorted({state.state for state in self.states})
            if len(self.states) > 1:
                return ", ".join(f"{sum(each.state == kind for each in self.states)} {kind.lower()}" for kind in kinds)
            if self.states[0].alive:
                return kinds[0].lower()
            return (told if told == "done" else self._last) if kinds == ["GONE"] else kinds[0].lower()
        held = owner.holder(self.folder)
        if told == "running" or (held is not None and told != "done"):
            return "running" if held is not None and owner.lives(held, self.folder) else "died"
        return told or self._last

    @property
    def _last(self) -> str:
        """What became of the last start that has ended."""
        return self.ended[-1]["then"] if self.ended else "unknown"

    @property
    def alive(self) -> bool:
        """Whether it runs or will."""
        return any(state.alive for state in self.states) or (not self.states and self.state == "running")


def runs(root: Path = Path("runs")) -> list[Path]:
    """The run directories below a folder."""
    found = {path.parent for pattern in ("*/config.yaml", "*/jobs.jsonl") for path in root.glob(pattern)}
    return sorted(found | {path.parent.parent for stage in _STAGES for path in root.glob(f"*/{stage}/status.json")})


def resolve(text: str) -> Path:
    """A run's directory, given by path or by its name under runs/; raises ValueError naming those there are."""
    for path in (Path(text), Path("runs") / text):
        if path.is_dir():
            return path.resolve()
    known = ", ".join(path.name for path in runs()) or "none"
    raise ValueError(f"there is no run {text}: give its directory, or the name of one under runs/ ({known})")


def report(run: Path | None) -> str:
    """All runs under runs/ in a table; or one, with what became of each of its starts."""
    folders = [run] if run is not None else runs()
    stages = {folder: stages_of(folder) for folder in folders}
    word = ask_the_queue([stage for each in stages.values() for stage in each])
    rows = [_row(folder, stage) for folder, each in stages.items() for stage in each]
    if not rows:
        return "no run has begun" + (f" in {run}" if run else " under runs/")
    told = [aligned([_HEADER, *rows], right=(5, 6, 7, 8, 10)), *([word] if word else [])]
    if run is not None:
        told += [line for stage in stages[run] for line in _starts(stage)]
    return "\n".join(told)


def stages_of(run: Path) -> list[Stage]:
    """Those that were begun or handed over, in order."""
    jobs = submitted(run)
    begun = [name for name in _STAGES if name in jobs or (run / name / "status.json").exists()]
    return [Stage(run / name, jobs.get(name)) for name in begun]


def ask_the_queue(stages: Sequence[Stage]) -> str:
    """Fill in what SLURM says of the stages' jobs, in one question; returns what to tell where it says nothing."""
    jobs = [stage.job.job for stage in stages if stage.job is not None]
    try:
        found = queue.states(jobs)
    except queue.QueueError as error:
        return f"SLURM says nothing of the jobs: {str(error).splitlines()[0]}"
    for stage in stages:
        if stage.job is not None:
            stage.states = found[stage.job.job]
    return ""


def cancel(run: Path) -> str:
    """End all jobs of a run, those that wait first; returns which. Raises ValueError where none is alive."""
    living = [state for stage in _known(run) for state in stage.states if state.alive]
    if not living:
        raise ValueError(f"no job of {run} is alive")
    waiting = [state.job for state in living if state.state == "PENDING"]
    others = [state.job for state in living if state.state != "PENDING"]
    for jobs in (waiting, others):
        if jobs:
            queue.cancel(*jobs)
    saving = f"; {', '.join(others)} may take a little, as training saves first" if others else ""
    return f"cancelled: {', '.join(waiting + others)}{saving}"


def requeue(run: Path) -> str | None:
    """Have a running job save, leave and wait again; returns what was done, None where no job is alive."""
    living = [state for stage in _known(run) for state in stage.states if state.alive]
    running = [state.job for state in living if state.state == "RUNNING"]
    for job in running:
        queue.cancel("--signal=USR2", job)
    if running:
        return f"told to save, leave and come back: {', '.join(running)}"
    return f"they wait already: {', '.join(state.job for state in living)}" if living else None


def _known(run: Path) -> list[Stage]:
    stages = stages_of(run)
    if word := ask_the_queue(stages):
        raise ValueError(word)
    return stages


def _row(run: Path, stage: Stage) -> tuple[str, ...]:
    status, line = stage.status, last_line(stage.folder / "metrics.jsonl")
    speed, training = line.get("samples_per_second"), stage.alive and status.get("state") == "running"
    seen, of, ended = status.get("samples"), status.get("of"), stage.ended
    left = of - seen if seen is not None and of is not None else 0
    ready = _clock(time.time() + left / speed) if training and speed and left else ""
    waits = next((state for state in stage.states if state.state == "PENDING"), None)
    return (
        run.name,
        stage.folder.name,
        stage.job.job if stage.job else "",
        stage.state,
        " ".join(dict.fromkeys(state.nodes for state in stage.states if state.alive and state.nodes)),
        _count(seen),
        _count(of),
        f"{speed:g}" if speed and training else "",
        f"{line['loss']:.4f}" if "loss" in line else "",
        _age(stage.folder),
        str(len(ended) + bool(stage.alive and status)) if ended else "",
        ready,
        _because(waits) if waits else (ended[-1]["why"][:70] if ended and ended[-1]["then"] != "done" else ""),
    )


def _because(waits: queue.JobState) -> str:
    words = {
        "Dependency": "waits for the stage before",
        "BeginTime": "requeued a moment ago",
        "Resources": "waits for nodes",
        "Priority": "waits for nodes, others come first",
    }
    return words.get(waits.reason, f"waits: {waits.reason}")


def _starts(stage: Stage) -> Iterator[str]:
    """A line for each start that has ended."""
    begun = {(entry["job"], entry["restart"]): entry for entry in history(stage.folder) if "began" in entry}
    for entry in stage.ended:
        first = begun.get((entry["job"], entry["restart"]), {})
        nodes = f" on {first['nodes']}" if first.get("nodes") else ""
        at = f" at {entry['place']} samples" if entry.get("place") else ""
        why = f": {entry['why']}" if entry.get("why") else ""
        span = f"{_clock(first['began'])} – {_clock(entry['ended'])}" if first else _clock(entry["ended"])
        yield f"{stage.folder.name}, job {entry['job']}, {span}{nodes}: {entry['then']}{at}{why}"


def last_line(path: Path) -> dict[str, Any]:
    """The last whole `train` line of a metrics.jsonl; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    for text in reversed(lines):
        try:
            line = json.loads(text)
        except ValueError:  # torn
            continue
        if isinstance(line, dict) and line.get("kind") == "train":
            return line
    return {}


def _age(folder: Path) -> str:
    """Of the newest checkpoint."""
    newest = place(folder)
    path = folder / "checkpoints" / f"step_{newest or 0:012d}" / "manifest.json"
    return f"{span(time.time() - path.stat().st_mtime)} ago" if newest and path.exists() else ""


def span(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `4 days`."""
    for unit, size, until in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds / size < until:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def _clock(moment: float) -> str:
    """The hour, and the day where it is another."""
    then, now = datetime.fromtimestamp(moment), datetime.now()
    return then.strftime("%H:%M" if then.date() == now.date() else "%d %b %H:%M")


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:_}".replace("_", "\u202f")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
