"""`spresso status --watch`: the table of runs, redrawn in place on a terminal, or printed at each change elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from launch.error_line import describe_error
from launch.output import reader_is_gone
from launch.status import table
from launch.status.kept_stages import KeptStages
from launch.status.queue_watch import QueueWatch
from launch.status.screen import Screen
from trainer.file_names import printable_lines

_AGE = re.compile(r"\b\d+ (s|min|h|days) ago\b")


def watch(run: Path | None, *, seconds: float) -> None:
    """Show the table of all runs, or of one, again and again until Ctrl-C.

    Args:
        run: directory of the run; None: all runs.
        seconds: time between two looks at the run directories. SLURM is asked at most every `queue_watch.LEAST`.
    """
    look = Look(run)
    try:
        if sys.stdout.isatty():
            _redraw(look, seconds)
        else:
            _print_changes(look, seconds)
    except KeyboardInterrupt:
        return


class Look:
    """The newest table. One that can't be made now leaves the last one, with the reason."""

    def __init__(self, run: Path | None, *, queue: QueueWatch | None = None) -> None:
        self.run, self.stages, self.queue = run, KeptStages(), queue or QueueWatch()
        self.text, self.problem, self.updated = "", "", 0.0

    def refresh(self) -> None:
        """Make the table anew."""
        try:
            told = table.report(self.run, read=self.stages.stages_of, ask=self.queue.fill, running_first=True)
        except (ValueError, OSError) as error:
            self.problem = describe_error(error).replace("\n", " ")
            return
        self.text, self.problem, self.updated = printable_lines(told), "", time.time()

    def foot(self, seconds: float) -> str:
        """Return the last line: when the table was made, how often, and what prevents a newer one."""
        when = datetime.fromtimestamp(self.updated).strftime("%H:%M:%S") if self.updated else "not yet"
        problem = f" · not newer: {printable_lines(self.problem)}" if self.problem else ""
        every = f"every {seconds:g} s, SLURM at most every {self.queue.least:g} s"
        return f"updated {when}{problem} · {every} · Ctrl-C ends"


def _redraw(look: Look, seconds: float) -> None:
    with Screen() as screen:
        look.refresh()
        due = time.monotonic() + seconds
        while not reader_is_gone():
            screen.show(look.text.split("\n"), look.foot(seconds))
            screen.wait(max(0.0, due - time.monotonic()))
            if time.monotonic() >= due:  # otherwise the window has a new size
                look.refresh()
                due = time.monotonic() + seconds


def _print_changes(look: Look, seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Print the table with its time whenever it differs in more than the age of something."""
    printed = None
    while not reader_is_gone():
        look.refresh()
        told = look.problem or look.text
        if (changed := _AGE.sub("", told).split()) != printed:
            print(f"{datetime.now().astimezone().isoformat(' ', 'seconds')}\n{told}\n", flush=True)
            printed = changed
        sleep(seconds)
