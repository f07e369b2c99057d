"""Runs the cases of `gpu.py`, each in a process of its own, and turns whatever goes wrong into a row.

A case that fails, crashes, runs out of memory or hangs takes nothing from the others. The process that starts the cases
imports what all of them need and never uses the device, so that its forks begin at once and may use the device.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gpu_report import Report

Row = Callable[..., None]
"""Adds a row to the report: its name, and its figures by name."""
Case = Callable[[Row], None]
_CRASHED = 70  # exit status of a case whose error row is written


class NotAvailable(Exception):
    """What a case measures does not exist here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """What all cases share."""

    folder: Path
    """The folder of the base model, the latents and the runs."""
    logs: Path
    """The folder of the cases' output."""
    device: str
    """`cuda` or `cpu`."""
    small: bool
    """Whether all sizes are tiny, to see that everything runs."""


@dataclass(frozen=True)
class Section:
    """Cases of one subject."""

    name: str
    module: str
    """The module whose `cases(setting)` returns the cases by name, the most important first."""
    share: float = 0.5
    """The largest fraction of the time left that the section may take."""


def run_section(section: Section, setting: Setting, report: Report, *, deadline: float, method: str) -> None:
    """Run a section's cases until it has used its share of the time, and note those that are not run.

    Args:
        section: the section.
        setting: what the cases share.
        report: takes the rows.
        deadline: the time (`time.monotonic()`) at which the last section has to be done.
        method: how a process starts: `fork` or `spawn`.
    """
    try:
        names = list(_cases(section, setting))
    except Exception as error:
        report.note(section.name, "all", "error", error)
        return
    ends = time.monotonic() + section.share * (deadline - time.monotonic())
    for name in names:
        left = ends - time.monotonic()
        if left <= 0:
            report.note(section.name, name, "not run", "the time is used up")
        else:
            _run_case(section, name, setting, report, seconds=left, method=method)


def forks_may_use_cuda() -> bool:
    """Whether a fork of this process may use CUDA, which it may not if an import here has begun to."""
    import torch

    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(torch.cuda._is_in_bad_fork()))
    process.start()
    process.join()
    return process.exitcode == 0


def _cases(section: Section, setting: Setting) -> Mapping[str, Case]:
    return importlib.import_module(section.module).cases(setting)


def _run_case(section: Section, name: str, setting: Setting, report: Report, *, seconds: float, method: str) -> None:
    """Run one case; note its end if it does not end well, or if it has to be ended."""
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=_in_own_process, args=(section, name, setting, report))
    process.start()
    process.join(seconds)
    if process.is_alive():
        end_group(process.pid)
        report.note(section.name, name, "not run", f"cut off after {seconds:.0f} s")
    elif process.exitcode not in (0, _CRASHED):
        told = f"signal {-process.exitcode}" if process.exitcode < 0 else f"status {process.exitcode}"
        report.note(section.name, name, "error", f"the process ended with {told}, see {_log(section, name, setting)}")
    process.join()


def end_group(leader: int) -> None:
    """Kill a process that leads a group, and all processes that it has started."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:  # it has not become a leader yet
        os.kill(leader, signal.SIGKILL)


def _in_own_process(section: Section, name: str, setting: Setting, report: Report) -> NoReturn:
    os.setpgid(0, 0)
    _send_output_to(_log(section, name, setting))
    status = _CRASHED
    try:
        _cases(section, setting)[name](lambda row, **figures: report.add(section.name, row, **figures))
        status = 0
    except NotAvailable as reason:
        report.note(section.name, name, "not available", str(reason))
    except BaseException as error:
        traceback.print_exc()
        report.note(section.name, name, "error", error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        end_children()
        os._exit(status)  # threads of process groups and of compilers would hold up a regular end


def end_children() -> None:
    """Kill the processes that multiprocessing has started here and that still run."""
    for child in multiprocessing.active_children():
        child.kill()


def _send_output_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)  # what was buffered before the fork is the parent's
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _log(section: Section, name: str, setting: Setting) -> Path:
    return setting.logs / f"{slug(section.name)}_{slug(name)}.txt"


def slug(name: str) -> str:
    """Return a name as a part of a file's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)
