"""Each rank's log file: what any module of this project logs goes there."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGES = ("launch", "trainer", "models")  # every module logs under its own name, below one of these


@contextmanager
def logging_to(path: Path, *, show: bool) -> Iterator[None]:
    """Inside the `with`, append all that this project's modules log to a file, and print it too where `show` says so.

    Every module logs to `logging.getLogger(__name__)`. A logger of another name would reach no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [to_file, *([logging.StreamHandler(sys.stderr)] if show else [])]
    loggers = [logging.getLogger(name) for name in _PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False  # other libraries give the root logger handlers of their own
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
        to_file.close()
