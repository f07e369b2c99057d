"""Hands a training's curves and clips to all trackers of the recipe, on rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from trainer.log.trackers.adapters import MlflowSink, TensorBoardSink, TrackedRun, TrackioSink, WandbSink
from trainer.log.trackers.background import Background, Sink
from trainer.log.trackers.events import Event
from trainer.log.trackers.prometheus import PrometheusSink
from trainer.recipes.privacy import public_settings, public_yaml
from trainer.recipes.schema import Config
from trainer.run_directory import RunDirectory

FLUSH_SECONDS = 10.0
"""How long the end of a stage, or of a preempted job, waits for all trackers together."""


class Trackers:
    """The trackers of a run, each in a thread of its own."""

    def __init__(self, backgrounds: Iterable[Background] = ()) -> None:
        self.backgrounds = list(backgrounds)

    def put(self, event: Event) -> None:
        """Hand an event to each tracker, without waiting for any."""
        for background in self.backgrounds:
            background.put(event)

    def close(self, seconds: float = FLUSH_SECONDS) -> None:
        """Let the trackers write what waits; those that need longer are left behind."""
        until = time.monotonic() + seconds
        for background in self.backgrounds:
            background.close()
        for background in self.backgrounds:
            background.join(until)


def open_trackers(config: Config, run: RunDirectory, *, resumed_at: int) -> Trackers:
    """Start the trackers that the recipe names; nothing is waited for.

    Args:
        config: the whole recipe.
        run: the stage's run directory.
        resumed_at: samples seen by the checkpoint that the run resumes from; 0 for a new run.
    """
    return Trackers(Background(name, sink) for name, sink in _sinks(config, run, resumed_at))


def _sinks(config: Config, run: RunDirectory, resumed_at: int) -> Iterable[tuple[str, Sink]]:
    tracked = TrackedRun(
        run,
        project=config.log.project,
        name=f"{config.name}.{run.stage}",
        settings={"stage": run.stage, **public_settings(config)},
        settings_text=public_yaml(config),
        flush_seconds=FLUSH_SECONDS,
    )
    kinds: dict[str, Callable[[TrackedRun], Sink]] = {"wandb": WandbSink, "mlflow": MlflowSink, "trackio": TrackioSink}
    for name in config.log.trackers:
        yield name, TensorBoardSink(tracked, resumed_at=resumed_at) if name == "tensorboard" else kinds[name](tracked)
    if config.log.prometheus is not None:
        planned = config.stage(run.stage).samples
        yield "prometheus", PrometheusSink(Path(config.log.prometheus), run, name=config.name, planned=planned)
