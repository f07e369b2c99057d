"""Writes a run's newest figures as a text file of Prometheus, for the textfile collector of a node exporter."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

from models.atomic_write import write_whole
from trainer.checkpoints.names import checkpoints
from trainer.log.trackers.events import HeardClip, Points
from trainer.run_directory import RunDirectory

_FIRST_LINE = "# Written by spresso"
_FIGURES = {
    "train/loss": ("loss", "Mean training loss since the last line of the log."),
    "held_out/loss": ("held_out_loss", "Loss on held-out clips at the last checkpoint."),
    "train/lr": ("learning_rate", "Learning rate of the last step."),
    "train/grad_norm": ("gradient_norm", "Gradient norm of the last step, before clipping."),
    "train/samples_per_second": ("samples_per_second", "Samples seen per second, over all ranks."),
    "train/mfu": ("mfu_ratio", "Used part of the devices' arithmetic."),
    "train/data_wait": ("data_wait_ratio", "Part of a step that waits for data."),
}
"""Curve → name of its metric without the prefix, and its help."""
_TERM = "train_terms/"


class PrometheusSink:
    """Keeps one file up to date. It is replaced as a whole, so that the collector never reads a part of it."""

    def __init__(self, path: Path, run: RunDirectory, *, name: str, planned: int) -> None:
        """`name` is that of the run; `planned` is the length of the stage in samples."""
        self.path, self.run, self.planned = path, run, planned
        self.labels = {"run": name, "stage": run.stage}
        self.samples, self.values = 0, dict[str, float]()

    def start(self) -> None:
        """Count the restarts. Raises ValueError if the path holds a file that no run wrote."""
        if self.path.exists() and not self.path.read_text(errors="replace").startswith(_FIRST_LINE):
            raise ValueError(f"{self.path} was not written by a run: rename it, or set another log.prometheus")
        commands = self.run.path / "command.txt"
        self.restarts = max(0, len(commands.read_bytes().splitlines()) - 1) if commands.is_file() else 0

    def points(self, event: Points) -> None:
        """Write the file with a line's figures. Terms that the line lacks are dropped."""
        self.samples = event.samples
        kept = {name: value for name, value in self.values.items() if not name.startswith(f"{event.key}")}
        self.values = kept | event.values
        self._write(running=True)

    def clip(self, event: HeardClip) -> None:
        """See `Sink`: there is nothing to show of a clip."""

    def go_back(self, samples: int) -> None:
        """See `Sink`: the next line has the new figures."""

    def finish(self) -> None:
        """Say that the run does not train any more."""
        self._write(running=False)

    def _write(self, *, running: bool) -> None:
        self.run.require_ownership()
        lines = [f"{_FIRST_LINE}: {self.run.path.resolve()}".translate({10: " "}), *self._lines(running)]
        write_whole(self.path, "\n".join(lines) + "\n", durable=False)

    def _lines(self, running: bool) -> Iterator[str]:
        yield from self._metric("running", "1 while the stage trains.", float(running))
        yield from self._metric("last_line_timestamp_seconds", "Time of the last line of the log.", time.time())
        yield from self._metric("samples_seen", "Samples that the stage has trained on.", self.samples)
        yield from self._metric("samples_planned", "Length of the stage in samples.", self.planned)
        yield from self._metric("restarts", "Starts of the stage after the first one.", self.restarts)
        if saved := checkpoints(self.run.checkpoints):
            when = saved[-1].stat().st_mtime
            yield from self._metric("last_checkpoint_timestamp_seconds", "Time of the newest checkpoint.", when)
        for curve, (name, help_) in _FIGURES.items():
            if curve in self.values:
                yield from self._metric(name, help_, self.values[curve])
        terms = [(curve, value) for curve, value in self.values.items() if curve.startswith(_TERM)]
        for number, (curve, value) in enumerate(terms):
            help_ = "" if number else "Mean of a loss term since the last line of the log."
            yield from self._metric("loss_term", help_, value, term=curve.removeprefix(_TERM))

    def _metric(self, name: str, help_: str, value: float, **labels: str) -> Iterator[str]:
        """Yield the lines of a gauge; without help, a further line of the one before."""
        if help_:
            yield f"# HELP spresso_{name} {help_}"
            yield f"# TYPE spresso_{name} gauge"
        pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in {**self.labels, **labels}.items())
        yield f"spresso_{name}{{{pairs}}} {_number(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else f"{'+' if value > 0 else '-'}Inf"
