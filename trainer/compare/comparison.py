"""All that a comparison of runs shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.compare.figures import Merged, PairedDifference, merge, paired_differences
from trainer.compare.runs import ComparedRun, read_runs
from trainer.compare.settings import Difference, differences


@dataclass(frozen=True)
class Comparison:
    """Runs, and how they differ."""

    runs: Sequence[ComparedRun]
    settings: Sequence[Difference]
    merged: Merged | None
    """The reports as one; None if no run has been evaluated."""
    differences: Sequence[PairedDifference]
    notes: Sequence[str]

    @property
    def first_evaluated(self) -> str:
        """Label of the run from which the differences are taken."""
        return next((run.label for run in self.runs if run.report is not None), "")

    @property
    def document(self) -> dict[str, Any]:
        """The comparison as `comparison.json` holds it."""
        return {
            "runs": [{"label": run.label, "folder": str(run.folder)} for run in self.runs],
            "settings": {each.key: list(each.values) for each in self.settings},
            "stages": {run.label: _without_curves(run) for run in self.runs},
            "figures": self._figures(),
            "differences": [{**dataclasses.asdict(each), "significant": each.significant} for each in self.differences],
            "notes": list(self.notes),
        }

    def difference_rows(
        self, cell: Callable[[PairedDifference | None], Any]
    ) -> tuple[list[Mapping[str, Any]], list[list[Any]]]:
        """Return the figures with differences, and a row for each system and run with a `cell` for each figure."""
        compared = {each.figure for each in self.differences}
        figures = (
            [figure for figure in self.merged.report["figures"] if figure["key"] in compared] if self.merged else []
        )
        found = {(each.system, each.run, each.figure): each for each in self.differences}
        pairs = dict.fromkeys((each.system, each.title, each.run) for each in self.differences)
        rows = [
            [title, run, *(cell(found.get((system, run, figure["key"]))) for figure in figures)]
            for system, title, run in pairs
        ]
        return figures, rows

    def _figures(self) -> list[dict[str, Any]]:
        if self.merged is None:
            return []
        results = self.merged.report["results"]
        return [
            {"system": system["title"], "kbps": system["payload_kbps"], **_means(results[system["key"]])}
            for system in self.merged.report["systems"]
            if results[system["key"]]
        ]


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare runs, given by their directories; the first evaluated one is that from which differences are taken.

    Raises:
        ValueError: fewer than two runs are given, a directory is no run, or a document of a run is damaged.
        OSError: a file can't be read now.
    """
    if len(folders) < 2:
        raise ValueError("a comparison needs two runs or more: spresso compare RUN RUN …")
    runs = read_runs(folders)
    merged = merge(runs) if any(run.report is not None for run in runs) else None
    unevaluated = [f"{run.label} has no evaluation: `spresso evaluate` makes it." for run in runs if not run.report]
    notes = [*unevaluated, *(merged.notes if merged else [])]
    found = paired_differences(runs, merged) if merged else []
    return Comparison(runs, differences(runs), merged, found, notes)


def _means(results: dict[str, Any]) -> dict[str, Any]:
    return {name: {"mean": result["mean"], "ci": result["ci"]} for name, result in results.items()}


def _without_curves(run: ComparedRun) -> dict[str, Any]:
    stages = {stage: dataclasses.asdict(facts) for stage, facts in run.stages.items()}
    return {stage: {name: v for name, v in facts.items() if not isinstance(v, list)} for stage, facts in stages.items()}
