"""What is compared of a run: its settings, its stages, their losses, and the report of its evaluation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.evaluate.report_file import read_whole_report
from trainer.evaluate.systems import EvaluationReport
from trainer.page.curves import Line, read_curve, read_held_out, smoothed_loss
from trainer.recipes.privacy import public_settings
from trainer.recipes.reading import read_stored_config
from trainer.run_documents import metrics_lines, read_status, warn_of
from trainer.stages import trained_stages

_REPORT = Path("evaluate") / "evaluation.json"
_OWN_PLACE = "RUN"
"""Stands for the run's own directory in the values of its settings."""


@dataclass(frozen=True)
class StageFacts:
    """What a stage of a run has reached; what was not recorded is None."""

    state: str
    samples: int | None
    held_out: float | None
    """The last held-out loss."""
    z_rank: int | None
    """Directions in which 99 % of the variance of z lies."""
    samples_per_second: float | None
    """Median over the lines of the log."""
    training: Line
    """The smoothed training loss over the samples seen."""
    held_out_curve: Line


@dataclass(frozen=True)
class ComparedRun:
    """A run that is compared with others."""

    label: str
    """Short name, unique among the compared runs."""
    folder: Path
    settings: Mapping[str, Any]
    """Settings by dotted key that may be published; paths in the run's own directory begin with `RUN`."""
    stages: Mapping[str, StageFacts]
    """The trained stages that have begun."""
    report: EvaluationReport | None
    """The report of the evaluation; None if the run has none."""

    @property
    def evaluation(self) -> Path:
        """The folder to which the paths of the report's recordings are relative."""
        return self.folder / _REPORT.parent


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Read runs from their directories.

    Raises:
        ValueError: a run is named twice, a directory is no run, or a document of a run is damaged.
    """
    resolved = [folder.resolve() for folder in folders]
    if twice := next((path for path in resolved if resolved.count(path) > 1), None):
        raise ValueError(f"{twice} is named twice: name each run once")
    return [_read(folder, label) for folder, label in zip(resolved, labels(resolved), strict=True)]


def labels(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ from each other: the folders' names, if these do."""
    most = max((len(folder.parts) for folder in folders), default=1)
    for depth in range(1, most + 1):
        ends = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(ends)) == len(ends):
            break
    return ends


def _read(folder: Path, label: str) -> ComparedRun:
    stages = [stage for stage in trained_stages() if (folder / stage / "config.yaml").is_file()]
    own = folder / "config.yaml"
    if not own.is_file() and not stages:
        raise ValueError(f"{folder} is no run: give a folder with the config.yaml that `spresso run` writes")
    general = own if own.is_file() else folder / stages[-1] / "config.yaml"
    settings = _settings(general)
    for stage in stages:  # the run's own config may have been written again since the stage was trained
        trained = _settings(folder / stage / "config.yaml")
        settings |= {key: value for key, value in trained.items() if key.startswith(f"{stage}.")}
    report = read_whole_report(folder / _REPORT) if (folder / _REPORT).is_file() else None
    facts = {stage: _facts(folder / stage) for stage in stages}
    return ComparedRun(label, folder, settings, facts, report)


def _settings(path: Path) -> dict[str, Any]:
    config = read_stored_config(path)
    return {key: _without_place(value, config.run_dir) for key, value in public_settings(config).items()}


def _without_place(value: Any, run_dir: str) -> Any:
    """Return a value in which the run's own directory is written as `RUN`, so that it is no difference of two runs."""
    if isinstance(value, str) and (value == run_dir or value.startswith(f"{run_dir}/")):
        return _OWN_PLACE + value[len(run_dir) :]
    if isinstance(value, list):
        return [_without_place(item, run_dir) for item in value]
    return value


def _facts(folder: Path) -> StageFacts:
    status, metrics = read_status(folder), folder / "metrics.jsonl"
    speeds, ranks = [], []
    lines = metrics_lines(metrics)
    for line in lines:
        if (speed := line.get("samples_per_second")) is not None:
            speeds.append(speed)
        if (rank := line.get("z_rank")) is not None:
            ranks.append(rank)
    warn_of(lines)
    held_out = read_held_out(metrics)
    return StageFacts(
        state=status.get("state", ""),
        samples=status.get("samples"),
        held_out=held_out[-1][1] if held_out else None,
        z_rank=ranks[-1] if ranks else None,
        samples_per_second=statistics.median(speeds) if speeds else None,
        training=smoothed_loss(read_curve(metrics)),
        held_out_curve=held_out,
    )
