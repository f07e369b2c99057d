"""Shows the progress of long work: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from tqdm import tqdm

from trainer.file_names import printable

LABEL = "SPRESSO_LABEL"
"""Environment variable: what stands before each line of progress, such as the point of a sweep. Ranks inherit it."""
LINE_EVERY = 10.0  # seconds between two lines if stderr is not a terminal


def labelled(title: str) -> str:
    """Return the title of some work, after the label of the environment if it has one."""
    label = os.environ.get(LABEL, "")
    return f"{label}: {title}" if label else title


class Progress:
    """Shows progress on stderr: `with Progress("prepare", total=12, unit="files") as progress: progress.to(3)`."""

    def __init__(self, title: str, *, total: float, unit: str, shown: bool = True) -> None:
        title = printable(labelled(title))
        self.title, self.total, self.unit = title, total, unit
        self.start, self.line = time.monotonic(), 0.0
        self.done = 0.0
        self.shown = shown
        terminal = shown and sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=title, unit=unit, unit_scale=True, dynamic_ncols=True) if terminal else None

    def to(self, done: float, *, of: float | None = None, **facts: object) -> None:
        """Show that `done` of the total is done, followed by `facts`. `of` replaces a total that has become known."""
        self.total = self.total if of is None else of
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_postfix({key: str(value) for key, value in facts.items()}, refresh=False)
            self.bar.update(done - self.done)
        elif self.shown and (time.monotonic() - self.line > LINE_EVERY or done >= self.total > self.done):
            self.line = time.monotonic()
            details = "".join(f", {key} {value}" for key, value in facts.items())
            seconds = self.line - self.start
            print(
                f"{self.title}: {done:g} of {self.total:g} {self.unit}, {seconds:.0f} s{details}",
                file=sys.stderr,
                flush=True,
            )
        self.done = done

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
