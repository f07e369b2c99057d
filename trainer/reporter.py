"""What a stage says of its long work beside the steps, and of what its user should know."""

from __future__ import annotations

import logging

from trainer.progress import Progress
from trainer.run_directory import RunDirectory

logger = logging.getLogger(__name__)


class Reporter:
    """Logs warnings and shows no progress."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Say that `done` of `total` steps of some work are done."""

    def warn(self, text: str) -> None:
        """Warn the user."""
        logger.warning("%s", text)


class StatusReporter(Reporter):
    """Shows progress on stderr and in `status.json`, which also keeps the warnings. On rank 0."""

    def __init__(self, run: RunDirectory, *, of: int) -> None:
        """`of` is the length of the stage in samples."""
        self.run, self.of = run, of
        self._progress: Progress | None = None

    def progress(self, what: str, done: int, total: int) -> None:
        """See `Reporter`; the work is over when `done` is `total`."""
        if self._progress is None:
            self._progress = Progress(f"{self.run.stage}: {what}", total=total, unit="steps")
        self._progress.to(done)
        self._write(doing=f"{what}: {done} of {total}")
        if done == total:
            self._progress.__exit__(None, None, None)
            self._progress = None

    def warn(self, text: str) -> None:
        """See `Reporter`."""
        super().warn(text)
        warnings = self.run.status.get("warnings", [])
        self._write(warnings=[*warnings, *([] if text in warnings else [text])])

    def _write(self, **facts: object) -> None:
        self.run.write_status("running", samples=self.run.status.get("samples", 0), of=self.of, **facts)
