"""Each rank's log file, which receives the log messages of all modules of this project."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.file_names import printable_lines

_PACKAGES = ("launch", "trainer", "models")  # Every module's logger is below one of these.


class _Printable(logging.Formatter):
    """Makes the control characters of a message visible, such as names of files may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


@contextmanager
def logging_to(path: Path, *, show: bool) -> Iterator[None]:
    """Append this project's log messages to a file inside the `with`, and also print them to stderr if `show`.

    Every module must log to `logging.getLogger(__name__)`: loggers with other names are not written to the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(path)
    to_file.setFormatter(_Printable("%(asctime)s %(levelname)s %(message)s"))
    try:
        with _handled([to_file, *([_to_stderr()] if show else [])]):
            yield
    finally:
        to_file.close()


@contextmanager
def log_shown() -> Iterator[None]:
    """Print this project's log messages to stderr inside the `with`: of what is done before a stage has a log file."""
    with _handled([_to_stderr()]):
        yield


def _to_stderr() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    return handler


@contextmanager
def _handled(handlers: list[logging.Handler]) -> Iterator[None]:
    """Give the log messages of this project to these handlers alone."""
    loggers = [logging.getLogger(name) for name in _PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False  # Other libraries add handlers to the root logger, which would print messages twice.
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate
            for handler in handlers:
                logger.removeHandler(handler)
