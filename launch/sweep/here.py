"""Runs a sweep on this machine: the shared stages first, then the points one after another."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from launch import owner
from launch.notify import DONE, FAILED, News, notify
from launch.pipeline import say
from launch.signals import INTERRUPTED, STOPPED, StopFlag
from launch.sweep import directory, outcomes
from launch.sweep.plan import Plan, SharedStage, SweepPoint
from trainer.progress import LABEL

_LOOK = 0.5  # seconds between two looks at whether a signal has come


@dataclass
class _Tally:
    """What has become of the parts of the sweep so far."""

    done: list[str] = field(default_factory=list)
    """Names of points."""
    failed: list[str] = field(default_factory=list)
    """Names of points."""
    lost: set[tuple[str, str]] = field(default_factory=set)
    """Keys of shared stages that have failed, or that need one which has."""


def run(plan: Plan) -> int:
    """Run a sweep; return the exit status: 0 if all points are done, 1 if some failed, 75 if a signal stopped it.

    Raises:
        ValueError: another process runs the sweep, or a file is in the way.
    """
    directory.require_free(plan.folder)
    with owner.holding(plan.folder), StopFlag() as stop:
        directory.make(plan)
        tally = _Tally()
        stopped = any(_run_shared(plan, tally, stop)) or any(_run_points(plan, tally, stop))
    if stopped:
        say(f"spresso: stopped and saved, {len(tally.done)} of {len(plan.points)} points are done; repeat the command")
        return STOPPED
    failed = f"; failed: {', '.join(tally.failed)}" if tally.failed else ""
    say(f"{len(tally.done)} of {len(plan.points)} points are done{failed}")
    news = News(FAILED if failed else DONE, str(plan.folder), plan.name, why=failed.removeprefix("; "))
    notify(plan.points[0].config.log.notify, news)
    return 1 if failed else 0


def _run_shared(plan: Plan, tally: _Tally, stop: StopFlag) -> Iterator[bool]:
    """Run the shared stages; yield for each run directory whether the sweep is to stop."""
    needed = plan.needed_by([point for point in plan.points if not directory.is_done(point)])
    groups = [list(group) for _, group in itertools.groupby(needed, key=lambda shared: shared.folder)]
    for number, group in enumerate(groups, start=1):
        label, stages = f"shared {number} of {len(groups)}", [shared.stage for shared in group]
        title = f"{label}: {' and '.join(stages)} for {len(group[-1].points)} points"
        if lost := [key for shared in group for key in shared.after if key in tally.lost]:
            say(f"{title}: not run, because {lost[0][1]} failed")
            tally.lost |= {shared.key for shared in group}
        elif all(map(directory.is_done, group)):
            say(f"{title}: done before")
        else:
            say(f"{title}, in {plan.folder / group[0].folder}")
            status = _run_part(plan, group[0], stages, label, stop)
            if status == STOPPED:
                yield True
            if status:
                tally.lost |= {shared.key for shared in group}
        yield stop()


def _run_points(plan: Plan, tally: _Tally, stop: StopFlag) -> Iterator[bool]:
    """Run the points; yield for each one whether the sweep is to stop."""
    for number, point in enumerate(plan.points, start=1):
        label = f"point {number} of {len(plan.points)}"
        if lost := [shared for shared in plan.needed_by([point]) if shared.key in tally.lost]:
            why = f"{lost[0].stage}, which it shares, failed"
            say(f"{label}: {point.name}: not run, because {why}")
            outcomes.append(plan.folder, directory.folder_of(point), outcomes.FAILED, why)
            tally.failed.append(point.name)
            continue
        if directory.is_done(point):
            say(f"{label}: {point.name}: done before")
            tally.done.append(point.name)
            continue
        say(f"{label}: {point.name}")
        status = _run_part(plan, point, point.own, label, stop)
        if status == STOPPED:
            yield True
        if status:
            say(f"{label}: {point.name} failed; the other points go on")
        (tally.failed if status else tally.done).append(point.name)
        yield stop()


def _run_part(plan: Plan, part: SweepPoint | SharedStage, stages: Sequence[str], label: str, stop: StopFlag) -> int:
    """Run stages in a process of their own; return its exit status, `STOPPED` if a signal ended it.

    A Ctrl-C reaches that process from the terminal; other signals to this process are passed on to it.
    """
    name = directory.folder_of(part)
    command = [sys.executable, "-m", "launch.sweep.part", str(plan.folder), name, *stages]
    process = subprocess.Popen(command, env=os.environ | {LABEL: label})
    passed_on = False
    try:
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK)
            if stop() and not passed_on:
                process.send_signal(signal.SIGTERM)
                passed_on = True
    except BaseException:  # a second Ctrl-C
        process.kill()
        process.wait()
        raise
    status = process.returncode
    if status < 0 and not stop():
        why = f"was killed by {signal.Signals(-status).name}"
        say(f"{label}: {name} {why}")
        outcomes.append(plan.folder, name, outcomes.FAILED, why)
    return STOPPED if status == STOPPED or (stop() and (status < 0 or status == INTERRUPTED)) else status
