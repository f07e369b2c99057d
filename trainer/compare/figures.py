"""The figures of several runs as one report, and the differences of runs, paired clip by clip."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.disk_errors import patiently
from trainer.compare.runs import ComparedRun
from trainer.evaluate import bootstrap
from trainer.evaluate.bootstrap import Numbers
from trainer.evaluate.report_file import recording
from trainer.evaluate.systems import RATE_RANGES, EvaluationReport
from trainer.page.system_cells import table_key

_OF_EMBEDDING = ("frechet", "kernel", "retrieval")
"""Figures that another embedding changes."""
_COMPETE = ("system", "baseline")
_OF_CLIPS = ("mean", "std", "ci", "clips", "control")


@dataclass(frozen=True)
class PairedDifference:
    """How a figure of one run's system differs from that of the first run's system of the same name."""

    system: str
    title: str
    run: str
    figure: str
    value: float
    """Mean over the clips that both have: this run minus the first one."""
    interval: tuple[float, float] | None
    better: bool
    """Whether the sign of the value is that of an improvement."""

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return bootstrap.excludes_zero(self.interval)


@dataclass(frozen=True)
class Merged:
    """The reports of several runs as one."""

    report: dict[str, Any]
    """A report as the listening page takes it. The keys of systems that differ between runs are `NUMBER:KEY`."""
    paired: bool
    """Whether all runs were scored on the same clips."""
    notes: list[str]
    """What a reader must know before comparing."""


def key_in(number: int, key: str) -> str:
    """Return the key in the merged report of a system of run `number`, counted from 0."""
    return f"{number}:{key}"


def merge(runs: Sequence[ComparedRun]) -> Merged:
    """Merge the reports of runs, at least one of which has a report.

    Systems that are the same in all runs, such as the original and other codecs, stand once, if the clips are the same.
    Otherwise, all stand once for each run. Which system is best is computed anew.

    Raises:
        ValueError: a recording of the originals is missing.
        OSError: a recording can't be read now.
    """
    evaluated = [(number, run, run.report) for number, run in enumerate(runs) if run.report is not None]
    reports = [report for _, _, report in evaluated]
    paired = _same_clips(evaluated)
    notes = []
    if not paired:
        notes.append("The runs were scored on different clips, so that no difference between them is tested.")
    figures = list({figure["key"]: figure for report in reports for figure in report["figures"]}.values())
    if len({report["embedding"] for report in reports}) > 1:
        figures = [figure for figure in figures if figure["key"] not in _OF_EMBEDDING]
        notes.append("The runs were scored with different embeddings: the figures that use them are left out.")
    entries = list(_systems(evaluated, paired=paired))
    results = {entry["key"]: _result(report, key, figures) for entry, report, key in entries}
    systems = [entry for entry, _, _ in entries]
    if paired:
        _mark_best(systems, results, figures)
    return Merged(_report(reports, systems, results, figures, _clips(evaluated, entries, paired=paired)), paired, notes)


def paired_differences(runs: Sequence[ComparedRun], merged: Merged) -> list[PairedDifference]:
    """Compare each run's systems with those of the first evaluated run; empty if the clips are not the same."""
    evaluated = [(number, run, run.report) for number, run in enumerate(runs) if run.report is not None]
    if not merged.paired or len(evaluated) < 2:
        return []
    _, _, first = evaluated[0]
    found = []
    for system in first["systems"]:
        if system["role"] != "system":
            continue
        for _, run, report in evaluated[1:]:
            for figure in merged.report["figures"]:
                ours, theirs = (_of_clips(each, system["key"], figure["key"]) for each in (report, first))
                if ours is None or theirs is None or not np.isfinite(ours - theirs).any():
                    continue
                value = float(np.nanmean(ours - theirs))
                bounds = bootstrap.interval(bootstrap.mean_replicates(ours - theirs))
                better = value < 0 if figure["better"] == "lower" else value > 0
                found.append(
                    PairedDifference(
                        system["key"], system["title"], run.label, figure["key"], value, bounds, better=better
                    )
                )
    return found


Evaluated = Sequence[tuple[int, ComparedRun, EvaluationReport]]


def _same_clips(evaluated: Evaluated) -> bool:
    """Whether all reports score as many clips, and play the same originals."""
    facts = [(_scored(report), _originals(run, report)) for _, run, report in evaluated]
    return all(fact == facts[0] for fact in facts)


def _scored(report: EvaluationReport) -> set[int]:
    """Return the number of clips that a report scores."""
    results = [result for results in report["results"].values() for result in results.values()]
    return {len(result["clips"]) for result in results if "clips" in result}


def _originals(run: ComparedRun, report: EvaluationReport) -> list[tuple[str, int]]:
    """Return the key of each clip that the report plays, with a hash of its original's file."""
    found = []
    for clip in report["clips"]:
        for source in clip["audio"].get("original", []):
            path = recording(run.evaluation, source)
            try:
                content = patiently(path.read_bytes)
            except FileNotFoundError:
                raise ValueError(f"{path} is missing: `spresso evaluate` makes it again") from None
            found.append((clip["key"], hash(content)))
    return found


def _systems(evaluated: Evaluated, *, paired: bool) -> Iterator[tuple[dict[str, Any], EvaluationReport, str]]:
    """Yield each system of the merged report, with the report that it is from and its key there.

    The systems of one name follow one another, run by run.
    """
    keys = list(dict.fromkeys(system["key"] for _, _, report in evaluated for system in report["systems"]))
    for key in keys:
        having = [
            (number, run, report, system)
            for number, run, report in evaluated
            for system in report["systems"]
            if system["key"] == key
        ]
        number, _, report, system = having[0]
        shared = paired and system["role"] != "system"
        if shared and all(_figures_of(other, key) == _figures_of(report, key) for _, _, other, _ in having):
            yield {**system, "key": key_in(number, key)}, report, key
            continue
        for number, run, report, system in having:
            yield {**system, "key": key_in(number, key), "title": f"{run.label} · {system['title']}"}, report, key


def _figures_of(report: EvaluationReport, key: str) -> dict[str, Any]:
    return {name: result["mean"] for name, result in report["results"].get(key, {}).items()}


def _result(report: EvaluationReport, key: str, figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the results of a system, without what its own report said about being the best."""
    wanted = [figure["key"] for figure in figures]
    results = report["results"].get(key, {})
    return {
        name: {part: result[part] for part in _OF_CLIPS if part in result}
        for name, result in results.items()
        if name in wanted
    }


def _of_clips(report: EvaluationReport, key: str, figure: str) -> Numbers | None:
    """Return a figure of each clip, NaN where it failed; None if the report has no such figure of clips."""
    values = report["results"].get(key, {}).get(figure, {}).get("clips")
    return None if values is None else _numbers(values)


def _numbers(values: Sequence[float | None]) -> Numbers:
    return np.array([math.nan if value is None else value for value in values])


def _mark_best(
    systems: Sequence[Mapping[str, Any]], results: Mapping[str, Any], figures: Sequence[Mapping[str, Any]]
) -> None:
    """Mark the best system of each range of rates, and whether the others differ from it, over figures of clips."""
    for rates in RATE_RANGES:
        rivals = [system["key"] for system in systems if system["role"] in _COMPETE and table_key(system) == rates]
        for figure in figures:
            name = figure["key"]
            known = {key: results[key][name] for key in rivals if results[key].get(name, {}).get("clips")}
            known = {key: result for key, result in known.items() if result["mean"] is not None}
            if len(known) < 2:
                continue
            choose = min if figure["better"] == "lower" else max
            best = choose(known, key=lambda key: known[key]["mean"])
            known[best]["best"] = True
            for key in known.keys() - {best}:
                difference_C = _numbers(known[key]["clips"]) - _numbers(known[best]["clips"])
                bounds = bootstrap.interval(bootstrap.mean_replicates(difference_C))
                known[key]["significant"] = bootstrap.excludes_zero(bounds)


def _clips(
    evaluated: Evaluated, entries: Sequence[tuple[Mapping[str, Any], EvaluationReport, str]], *, paired: bool
) -> list[dict[str, Any]]:
    """Return the clips of all reports, each with the recordings of the systems in the merged report.

    Unless all runs were scored on the same clips, each run's clips stand by themselves.
    """
    clips: dict[str, dict[str, Any]] = {}
    for number, run, report in evaluated:
        for clip in report["clips"]:
            name = clip["key"] if paired else key_in(number, clip["key"])
            caption = clip["caption"] if paired else f"{run.label} · {clip['caption'] or clip['key']}"
            merged = clips.setdefault(name, {**clip, "key": name, "caption": caption, "audio": {}})
            for entry, source, key in entries:
                if source is report and clip["audio"].get(key):
                    merged["audio"][entry["key"]] = clip["audio"][key]
    return list(clips.values())


def _report(
    reports: Sequence[EvaluationReport],
    systems: list[dict[str, Any]],
    results: dict[str, Any],
    figures: list[Mapping[str, Any]],
    clips: list[dict[str, Any]],
) -> dict[str, Any]:
    first = reports[0]
    return {
        "sample_rate": max(report["sample_rate"] for report in reports),
        "channels": max(report.get("channels", 1) for report in reports),
        "systems": systems,
        "figures": figures,
        "embedding": first["embedding"],
        "results": results,
        "variability": {"decodes": 1, "systems": [], "figure": first["variability"]["figure"]},
        "clips": clips,
    }
