"""Checks how a recipe's runs are watched: trackers, notifications, the file for Prometheus."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator
from pathlib import Path

from trainer.recipes.schema import LogConfig

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio"}
"""Tracker, which is also the name of its module → the package to install. `mlflow` holds `mlflow-skinny`."""


def watching_problems(log: LogConfig) -> list[str]:
    """Return a line for each problem of how runs are watched."""
    return [*_trackers(log), *_prometheus(log), *_notify(log)]


def _trackers(log: LogConfig) -> Iterator[str]:
    for name in log.trackers:
        if name not in TRACKERS:
            yield f"log.trackers holds {name}, which is none of {', '.join(TRACKERS)}"
        elif importlib.util.find_spec(name) is None:
            yield (
                f"log.trackers: the package of {name} is not installed: pip install {TRACKERS[name]} (or all of them: "
                f"pip install 'spresso[trackers]'), or remove {name}"
            )
    if len(set(log.trackers)) < len(log.trackers):
        yield f"log.trackers={log.trackers} names a tracker twice: remove one"
    if not log.project.strip():
        yield "log.project is empty: give log.project=…"


def _prometheus(log: LogConfig) -> Iterator[str]:
    if log.prometheus is not None and Path(log.prometheus).suffix != ".prom":
        yield f"log.prometheus={log.prometheus} must end in .prom: the collector reads no other file"


def _notify(log: LogConfig) -> Iterator[str]:
    """Yield what is wrong with `log.notify`, whose value is not repeated: it may be a secret."""
    if log.notify is None:
        return
    try:
        words = shlex.split(log.notify)
    except ValueError as error:
        yield f"log.notify is no command: {error}; a command is split like a shell's words"
        return
    if not words:
        yield "log.notify is empty: give a command or a URL, or log.notify=null"
