"""The comparison as text for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainer.compare.comparison import Comparison
from trainer.compare.figures import PairedDifference
from trainer.compare.runs import StageFacts
from trainer.compare.settings import NOTHING
from trainer.evaluate import tables
from trainer.file_names import printable
from trainer.formatting import aligned, in_markdown

_WIDEST = 44  # letters of a setting's value in a terminal


@dataclass(frozen=True)
class TextTable:
    """A table with a title; the cells of all columns but the first `left` ones are numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]
    left: int = 1
    note: str = ""


def text(comparison: Comparison) -> str:
    """Render the comparison for a terminal."""
    parts = []
    for table in _tables(comparison, lambda text: text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"):
        lines = [printable(table.title), aligned([table.head, *table.rows], right=range(table.left, len(table.head)))]
        parts.append("\n".join([*lines, *([table.note] if table.note else [])]))
    return "\n\n".join([*parts, *map(printable, comparison.notes)])


def markdown(comparison: Comparison) -> str:
    """Render the comparison in Markdown."""
    parts = [f"# {in_markdown(', '.join(run.label for run in comparison.runs))}"]
    for table in _tables(comparison, str):
        ruler = ["---"] * table.left + ["--:"] * (len(table.head) - table.left)
        rows = [list(map(in_markdown, row)) for row in (table.head, *table.rows)]
        lines = [rows[0], ruler, *rows[1:]]
        parts += [f"## {table.title}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
        parts += [in_markdown(table.note)] if table.note else []
    return "\n\n".join([*parts, *map(in_markdown, comparison.notes)]) + "\n"


def _tables(comparison: Comparison, shorten: Callable[[str], str]) -> list[TextTable]:
    labels = [run.label for run in comparison.runs]
    settings = [[each.key, *map(shorten, each.texts)] for each in comparison.settings]
    made = [TextTable("Settings that differ", ["setting", *labels], settings, left=len(labels) + 1)] if settings else []
    if stages := stage_rows(comparison):
        made.append(TextTable("Stages", ["stage", "run", *STAGE_HEAD], stages, left=3))
    if comparison.merged is not None:
        made.append(_figures(comparison))
        made += [_differences(comparison)] if comparison.differences else []
    return made


STAGE_HEAD = ["state", "samples", "held-out loss", "z's directions", "samples/s"]


def stage_rows(comparison: Comparison) -> list[list[str]]:
    """Return a row for each stage of each run: stage, run, and the cells below `STAGE_HEAD`."""
    return [
        [stage, run.label, *_stage_cells(facts)]
        for stage in dict.fromkeys(stage for run in comparison.runs for stage in run.stages)
        for run in comparison.runs
        if (facts := run.stages.get(stage))
    ]


def _stage_cells(facts: StageFacts) -> list[str]:
    return [
        facts.state or NOTHING,
        NOTHING if facts.samples is None else f"{facts.samples:,}",
        NOTHING if facts.held_out is None else f"{facts.held_out:.4g}",
        NOTHING if facts.z_rank is None else str(facts.z_rank),
        NOTHING if facts.samples_per_second is None else f"{facts.samples_per_second:.3g}",
    ]


def _figures(comparison: Comparison) -> TextTable:
    assert comparison.merged is not None
    report = comparison.merged.report
    head = ["system", "kbps", *(f"{figure['key']} {figure['unit']}".strip() for figure in report["figures"])]
    rows = []
    for title, systems in tables.sections(report):
        rows.append([f"-- {title}", *[""] * (len(head) - 1)])
        rows += [[row.title, row.kbps, *(cell.plain for cell in row.cells)] for row in systems]
    note = "mean ± half of the 95 % interval [decoded from another clip's z]"
    note += "; * best, or not significantly worse" if comparison.merged.paired else ""
    return TextTable("Figures", head, rows, note=note)


def _differences(comparison: Comparison) -> TextTable:
    figures, rows = comparison.difference_rows(_difference_cell)
    head = ["system", "run", *(f"{figure['key']} {figure['unit']}".strip() for figure in figures)]
    note = "the run minus the first, paired over the clips, with the 95 % interval; better or worse: it excludes zero"
    return TextTable(f"Differences from {comparison.first_evaluated}", head, rows, left=2, note=note)


def _difference_cell(difference: PairedDifference | None) -> str:
    """Return a difference with its interval, and whether it is better or worse if the interval excludes zero."""
    if difference is None:
        return NOTHING
    verdict = (" better" if difference.better else " worse") if difference.significant else ""
    bounds = "" if difference.interval is None else " [{:+.3g}, {:+.3g}]".format(*difference.interval)
    return f"{difference.value:+.3g}{verdict}{bounds}"
