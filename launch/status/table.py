"""`spresso status`: the table of runs, from the run directories and the queue. Also cancels and requeues runs.

Importing this module needs no torch.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from launch.error_line import describe_error
from launch.slurm import scheduler
from launch.slurm.begin_end import place
from launch.slurm.requeue_policy import DONE, OVER, REQUEUE, RESTART
from launch.status import sweeps, upload
from launch.status.run_stages import ask_the_queue, shown, stages_of
from launch.status.stage_status import SILENT_AFTER, StageStatus, count, span
from trainer.checkpoints.names import MANIFEST, folder_name
from trainer.formatting import aligned
from trainer.stages import STAGES

T = TypeVar("T")

_HEADER = ("run, stage", "job", "state", "nodes", "samples", "samples/s", "loss", "saved", "expected end")
_RIGHT = (4, 5, 6)
_WIDTH = 120
_INDENT = " " * 14  # of the remarks below the row of a stage, to the right of its name
_FAR = 10 * 365 * 86400.0  # seconds beyond which the expected end is not a date
_NODES = 14  # characters of the list of nodes; the lines on the starts of a run show the full list
_WAITS = {
    "": "waits",
    "Priority": "waits behind others",
    "Resources": "waits for nodes",
    "BeginTime": "restarts soon",
    "DependencyNeverSatisfied": "never: a stage failed",
    "JobHeldUser": "held by scontrol hold",
    "JobHeldAdmin": "held by an admin",
}


def runs() -> list[Path]:
    """Return the run directories under runs/, and those with a config.yaml two levels below the current folder."""
    own = [path for path in Path("runs").glob("*/") if _is_run(path)]
    others = [path.parent for path in Path().glob("[!.]*/[!.]*/config.yaml") if _is_run(path.parent)]
    return sorted({*own, *others})


def resolve(text: str) -> Path:
    """Return a run's directory, given by path or by name under runs/. Raises ValueError with the known runs."""
    folders = [path.resolve() for path in (Path(text), Path("runs") / text) if path.is_dir()]
    if folders:
        return next((path for path in folders if sweeps.is_sweep(path) or _is_run(path)), folders[0])
    known = ", ".join(path.name for path in runs()) or "none"
    raise ValueError(f"there is no run {text}: give its directory, or the name of one under runs/ ({known})")


def _is_run(folder: Path) -> bool:
    if sweeps.is_sweep(folder):
        return False
    try:
        return (folder / "jobs.jsonl").exists() or any(StageStatus(folder / name, None).begun for name in STAGES)
    except OSError:  # it may be one, and `stages_of` says why nobody can tell
        return True


def report(
    run: Path | None,
    *,
    read: Callable[[Path], list[StageStatus]] | None = None,
    ask: Callable[[Sequence[StageStatus]], str] | None = None,
    running_first: bool = False,
) -> str:
    """Return a table of all runs; or of one run, followed by a line for each start of its jobs; or of a sweep.

    Args:
        run: directory of the run; None: all runs.
        read: what returns the stages of a run; None: `stages_of`.
        ask: what fills in the states of jobs; None: `ask_the_queue`.
        running_first: whether the runs that run or wait stand above the others, for a window that shows only some.
    """
    if run is not None and sweeps.is_sweep(run):
        return sweeps.report(run, read=read, ask=ask)
    problems: list[str] = []
    stages = _of_each([run] if run is not None else runs(), read or stages_of, problems)
    # jobs that their script has closed are not asked about: SLURM forgets them, and accounting takes longer to answer
    open_stages = [stage for each in stages.values() for stage in each if not stage.over]
    found = [] if run is not None else sweeps.overview(read)
    open_stages += [stage for sweep in found for stage in sweep.open_stages]
    problem = (ask or ask_the_queue)(open_stages)
    if running_first:
        stages = dict(sorted(stages.items(), key=lambda item: not any(each.runs or each.living for each in item[1])))
    if problem:
        problems.append(textwrap.shorten(f"from the run directories alone: {problem}", _WIDTH, placeholder=" …"))
    rows = _of_each(stages, lambda folder: _rows(stages[folder]), problems)
    lines = [_table(rows)] if any(rows.values()) else [f"no run has begun under {shown(run or Path('runs'))}"]
    lines += [sweep.summary for sweep in found]
    if run in rows:
        told = [line for stage in stages[run] for text in starts(stage) for line in _wrapped(text, "")]
        lines += ["", *told] if told else []
    return "\n".join([*lines, *problems])


def _of_each(runs: Iterable[Path], read: Callable[[Path], T], problems: list[str]) -> dict[Path, T]:
    """Return what `read` returns for each run, except for those that are damaged or can't be read.

    What is wrong with these is added to `problems`: they must not hide the others.
    """
    found = {}
    for run in runs:
        try:
            found[run] = read(run)
        except (ValueError, OSError) as error:
            problems.append(describe_error(error))
    return found


def cancel(run: Path) -> str:
    """Cancel all jobs of a run; return a message that names the jobs. Raises ValueError if no job is alive."""
    living = _living(run)
    if not living:
        by_hand = _by_hand(run)
        how = f"; it is trained by {by_hand}, which you can end with Ctrl-C or `kill`" if by_hand else ""
        raise ValueError(f"{shown(run)} has no job that waits or runs{how}")
    waiting = [job for job, (_, each) in living.items() if any(state.state == "PENDING" for state in each)]
    others = [job for job, (_, each) in living.items() if any(state.state != "PENDING" for state in each)]
    waiting.reverse()  # the last of a chain first: SLURM cancels dependent jobs itself after their predecessor
    if waiting:
        scheduler.cancel("--state=PENDING", *waiting)
    scheduler.cancel(*living)  # also those that have started since the query
    cancelled = [*(job for job in waiting if job not in others), *others]
    saving = f"; training in {_named(living, others)} saves before it ends" if others else ""
    return f"cancelled {_named(living, cancelled)}{saving}"


def requeue(run: Path) -> str | None:
    """Make running jobs save and return to the queue; return a message, or None if no job is alive.

    Raises:
        ValueError: SLURM does not answer, or the run is trained without it.
    """
    living = _living(run)
    running = [state.job for _, each in living.values() for state in each if state.state == "RUNNING"]
    for job in running:
        # this signals the steps of the job alone: the batch script stays and requeues the job
        scheduler.cancel("--signal=USR2", job)
    if running:
        return f"asked to save and return to the queue: {', '.join(running)}"
    if living:
        return f"nothing to do, already waiting or ending: {_named(living, living)}"
    if by_hand := _by_hand(run):
        raise ValueError(f"{shown(run)} is trained by {by_hand}, not by a job that could be requeued")
    return None


def _living(run: Path) -> dict[str, tuple[str, list[scheduler.JobState]]]:
    """Return the living jobs of a run by id, with the names of their stages and the states of their living parts.

    All jobs are queried, because a user may have requeued a job that was over. Raises ValueError if SLURM does not
    answer.
    """
    stages, found = _all_stages(run), dict[str, tuple[str, list[scheduler.JobState]]]()
    if problem := ask_the_queue(stages):
        raise ValueError(problem)
    for stage in stages:
        if stage.job is not None and stage.living:
            names = [found[stage.job.job][0], stage.folder.name] if stage.job.job in found else [stage.folder.name]
            found[stage.job.job] = (", ".join(names), stage.living)
    return found


def _all_stages(run: Path) -> list[StageStatus]:
    """Return the stages of a run, or those of all runs of a sweep."""
    return [
        stage for each in (sweeps.run_directories(run) if sweeps.is_sweep(run) else [run]) for stage in stages_of(each)
    ]


def _by_hand(run: Path) -> str:
    """Return the name of the living process that trains a run without SLURM; empty if there is none."""
    return next((stage.by_hand for stage in _all_stages(run) if stage.by_hand and stage.state == "running"), "")


def _named(living: dict[str, tuple[str, list[scheduler.JobState]]], jobs: Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(f"{job} ({living[job][0]})" for job in jobs)


def _rows(stages: Sequence[StageStatus]) -> list[tuple[tuple[str, ...], list[str]]]:
    """Return the row of each stage of a run, and the lines of remarks below it."""
    return [
        (_row(stage, stages[:number]), [line for text in remarks(stage) for line in _wrapped(text, _INDENT)])
        for number, stage in enumerate(stages)
    ]


def _table(runs: dict[Path, list[tuple[tuple[str, ...], list[str]]]]) -> str:
    rows: list[tuple[str, ...]] = [_HEADER]
    above, below = [list[str]()], [list[str]()]
    for run, each in runs.items():
        for number, (row, remarks) in enumerate(each):
            rows.append(row)
            above.append([] if number else [shown(run)])
            below.append(remarks)
    lines = aligned(rows, right=_RIGHT).split("\n")
    return "\n".join(
        text for three in zip(above, lines, below, strict=True) for text in (*three[0], three[1], *three[2])
    )


def _row(stage: StageStatus, before: Sequence[StageStatus]) -> tuple[str, ...]:
    status, line, parts = stage.status, stage.line, stage.parts
    seen, of = status.get("samples"), status.get("of")
    where = " ".join(dict.fromkeys(state.nodes for state in stage.living if state.nodes))
    if stage.by_hand and stage.holder is not None:
        where = stage.holder.host
    samples = f"{count(seen)} of {count(of)}" if of and seen is not None else ""
    return (
        f"  {stage.folder.name}",
        f"pid {stage.holder.pid}" if stage.by_hand and stage.holder else stage.job.job if stage.job else "",
        stage.state,
        where if len(where) <= _NODES else f"{where[: _NODES - 1]}…",
        f"{parts['done']} of {sum(parts.values())} parts" if parts else samples,
        f"{line['samples_per_second']:.4g}" if stage.speaks and line.get("samples_per_second") else "",
        f"{line['loss']:.4f}" if isinstance(line.get("loss"), int | float) else "",
        checkpoint_age(stage.folder),
        expected_end(stage, before),
    )


def expected_end(stage: StageStatus, before: Sequence[StageStatus]) -> str:
    """Return when a stage will be done, or why that is unknown."""
    if stage.state == "pending":
        waits = next((state for state in stage.living if state.state == "PENDING"), None)
        if waits is None:
            return ""
        if waits.reason == "Dependency":
            names = [other.folder.name for other in before if other.living or other.state == "running?"]
            return f"waits for {names[-1] if names else 'the stage before'}"
        return _WAITS.get(waits.reason, f"waits: {waits.reason}")
    if not stage.runs:
        return "never began" if stage.state == "gone" and not stage.of_this_job else ""
    if not stage.speaks:
        return "starts up" if stage.holder else ""  # only trained stages have an owner and log lines
    if (quiet := time.time() - stage.line["time"]) > SILENT_AFTER:
        return f"silent for {span(quiet)}"
    left, speed = stage.status.get("of", 0) - stage.line["samples"], stage.line.get("samples_per_second")
    if not speed or (seconds := max(0, left) / speed) > _FAR:
        return "in years" if speed else ""
    return _clock(max(time.time(), stage.line["time"] + seconds))


def remarks(stage: StageStatus) -> Iterator[str]:
    """Yield remarks on a stage that do not fit into its row."""
    kinds = [f"{number} {kind}" for kind, number in stage.parts.items() if number]
    if len(kinds) > 1:
        yield f"parts: {', '.join(kinds)}"
    thens = (REQUEUE, RESTART, OVER)
    whys = {then: [_why(entry) for entry in stage.of_this_job if entry.get("then") == then] for then in thens}
    times = _times(whys[REQUEUE])
    if stage.state == "failed" and whys[OVER]:
        yield f"over{f', after being requeued {times}' if whys[REQUEUE] else ''}: {whys[OVER][-1]}"
    elif whys[REQUEUE]:
        yield f"requeued {times}{', most recently' if times != 'once' else ''}: {whys[REQUEUE][-1]}"
    if whys[RESTART]:
        again = _times(whys[RESTART])
        yield f"restarted in the job {again}{', most recently' if again != 'once' else ''}: {whys[RESTART][-1]}"
    if stage.state == "died":
        yield f"{stage.by_hand} is dead: repeat the command to resume from the last checkpoint"
    if stage.state == "gone" and stage.of_this_job:
        yield "SLURM no longer knows the job, and the job did not record how it ended"
    if stage.state == "silent":
        yield f"nothing written for {span(time.time() - stage.spoke)}"
    if stage.state == "no export":
        yield f"was done, but {stage.missing_export}"
    if stage.runs and stage.status.get("doing"):
        yield stage.status["doing"]
    if told := upload.remark(stage.folder, runs=stage.runs):
        yield told
    yield from stage.status.get("warnings", ())
    yield from stage.damaged


def _times(whys: Sequence[str]) -> str:
    return "once" if len(whys) == 1 else f"{len(whys)} times"


def _why(entry: dict[str, Any]) -> str:
    return entry.get("why") or "unknown reason"


def starts(stage: StageStatus) -> Iterator[str]:
    """Yield a line on each start of a stage's jobs: job, nodes, times and outcome."""
    closed = {_start(entry): entry for entry in stage.history if "then" in entry}
    opened = {_start(entry): entry for entry in stage.history if "began" in entry}
    for key in dict.fromkeys(map(_start, stage.history)):
        first, last = opened.get(key, {}), closed.get(key, {})
        when = f"from {_clock(first['began'])}" if first else ""
        when += f" to {_clock(last['ended'])}" if last.get("ended") else ""
        words = (f"{stage.folder.name}, job {key[0]}", first.get("nodes", ""), when.strip())
        yield f"{', '.join(filter(None, words))}: {_outcome(stage, key, last)}"


def _start(entry: dict[str, Any]) -> tuple[str, tuple[int, int]]:
    """Return the job of a line of the history, and how often it was requeued and its ranks were restarted in it."""
    return entry["job"], (entry["restart"], entry.get("generation", 0))


def _outcome(stage: StageStatus, key: tuple[str, tuple[int, int]], last: dict[str, Any]) -> str:
    if not last:
        return "running" if _is_running(stage, key) else "ended without a note: cancelled, killed, or its node was lost"
    at = f" at {count(last['place'])} samples" if last.get("place") and last["then"] != DONE else ""
    return f"{last['then']}{at}{': ' if last.get('why') else ''}{last.get('why', '')}"


def _is_running(stage: StageStatus, key: tuple[str, tuple[int, int]]) -> bool:
    """Whether a start without a recorded end is the one that runs now."""
    newest = max(start for job, start in map(_start, stage.history) if job == key[0])
    running = [state.job for state in stage.living if state.state != "PENDING"]
    return key[1] == newest and (key[0] in running or stage.state == "running?")


def checkpoint_age(folder: Path) -> str:
    """Return the age of the newest checkpoint."""
    try:
        newest = place(folder)
        path = folder / "checkpoints" / folder_name(newest or 0) / MANIFEST
        return f"{span(time.time() - path.stat().st_mtime)} ago" if newest else ""
    except OSError:  # just removed, damaged, or on a disk that is away
        return ""


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def _clock(moment: float) -> str:
    """Return a local time: the hour, with the weekday or the date unless it is today."""
    then, now = datetime.fromtimestamp(moment), datetime.now()
    if then.date() == now.date():
        return then.strftime("%H:%M")
    return then.strftime("%a %H:%M" if 0 < moment - now.timestamp() < 6 * 86400 else "%d %b %H:%M")
