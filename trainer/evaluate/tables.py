"""The report as tables: text for a terminal, Markdown, and LaTeX for a paper.

A cell is the mean, ± half of its 95 % interval, and in brackets the same figure of decodes from another clip's z. Bold
(in text: a star) is the best of a table and what does not differ significantly from it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.atomic_write import write_whole
from trainer.evaluate.systems import RATE_RANGES, EvaluationReport
from trainer.formatting import aligned

_NOTHING = "–"
_SHORT = {
    "log_mel": "Log-mel",
    "mrstft": "MR-STFT",
    "lsd": "LSD",
    "denoising": "Denoising",
    "frechet": "FD ({embedding})",
    "kernel": "KD ({embedding})",
    "spread": "Spread",
}
"""Heads of the columns in a paper, where the figure's title is long."""
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "×": r"$\times$",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
    "·": r"$\cdot$",
    "µ": r"$\mu$",
    "σ": r"$\sigma$",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
}


@dataclass(frozen=True)
class Cell:
    """One figure of one system, as text; empty where there is none."""

    mean: str = ""
    half: str = ""
    control: str = ""
    good: bool = False
    """The best of its table, or not significantly worse."""

    @property
    def plain(self) -> str:
        """For a terminal."""
        if not self.mean:
            return ""
        parts = [self.mean + ("*" if self.good else ""), f"±{self.half}" if self.half else ""]
        return " ".join(filter(None, [*parts, f"[{self.control}]" if self.control else ""]))

    @property
    def markdown(self) -> str:
        """With bold."""
        if not self.mean:
            return _NOTHING
        mean = f"**{self.mean}**" if self.good else self.mean
        half, control = (f" ± {self.half}" if self.half else ""), (f" [{self.control}]" if self.control else "")
        return mean + half + control

    @property
    def latex(self) -> str:
        """In math, so that a minus is one."""
        if not self.mean:
            return "--"
        mean = rf"\mathbf{{{self.mean}}}" if self.good else self.mean
        half, control = (rf" \pm {self.half}" if self.half else ""), (f"\\;[{self.control}]" if self.control else "")
        return f"${mean}{half}{control}$"


@dataclass(frozen=True)
class TableRow:
    """A system in a table."""

    title: str
    kbps: str
    cells: list[Cell]
    unavailable: str
    licence: str


def table(report: EvaluationReport) -> str:
    """For a terminal: a system a line, in sections."""
    columns = _columns(report)
    lines = [["system", "kbps", *(f"{column['key']} {column['unit']}".strip() for column in columns)]]
    notes = []
    for title, rows in sections(report):
        lines.append([f"-- {title}", *[""] * (len(columns) + 1)])
        lines += [[row.title, row.kbps, *(cell.plain for cell in row.cells)] for row in rows if not row.unavailable]
        notes += [f"{row.title}: not available, {row.unavailable}" for row in rows if row.unavailable]
    speed = report["speed"]
    told = (
        f"encode {speed['encode_realtime_factor']}× and decode {speed['decode_realtime_factor']}× as fast as it sounds "
        f"({speed['steps']} steps, {speed['device']})"
    )
    legend = f"mean ± half of the 95 % interval [from another clip's z]; {_sets(report)}; * best, or not clearly worse"
    return "\n".join([aligned(lines, right=range(1, len(lines[0]))), legend, *notes, told])


def markdown(report: EvaluationReport) -> str:
    """Tables for a README or an issue, one a section."""
    columns = _columns(report)
    parts = [f"## {_plain(report['recipe'])}", f"{_plain(report['subtitle'])}."]
    head = ["System", "kbps", *(f"{column['title']} {_unit_and_way(column)}".strip() for column in columns)]
    for title, rows in sections(report):
        lines = [head, ["---", *["--:"] * (len(head) - 1)]]
        for row in rows:
            shown = [cell.markdown for cell in row.cells] if not row.unavailable else [_NOTHING] * len(columns)
            lines.append([row.title + (" (not available)" if row.unavailable else ""), row.kbps or _NOTHING, *shown])
        text = "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)
        notes = [f"* {_plain(row.title)}: {_plain(_note(row))}" for row in rows if _note(row)]
        parts += [f"### {title}", text, *(["\n".join(notes)] if notes else [])]
    parts.append(
        "Mean ± half of the 95 % interval (bootstrap over clips); in brackets the same decoded from another clip's z. "
        f"Bold: the best of a table, and what does not differ significantly from it. D{_plain(_sets(report))[1:]}."
    )
    return "\n\n".join(parts) + "\n"


def latex(report: EvaluationReport) -> str:
    """A `table*` for a paper; needs the packages booktabs and graphicx."""
    columns = _columns(report)
    width = len(columns) + 2
    heads = ["System", "kbps", *(_latex_head(column, report["embedding"]) for column in columns)]
    units = ["", "", *(_escaped(column["unit"]) for column in columns)]
    lines = [
        r"% \usepackage{booktabs,graphicx}",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{_escaped(_caption(report))}}}",
        rf"\label{{tab:{''.join(c if c.isalnum() else '-' for c in report['recipe'])}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        r"\toprule",
        *(" & ".join(line) + r" \\" for line in (heads, units)),
    ]
    for title, rows in sections(report):
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{_escaped(title)}}}}} \\"]
        for row in rows:
            cells = [_escaped(row.title), row.kbps or "--"]
            if row.unavailable:
                cells.append(rf"\multicolumn{{{len(columns)}}}{{l}}{{not available}}")
            lines.append(" & ".join([*cells, *(cell.latex for cell in row.cells if not row.unavailable)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table*}"]) + "\n"


def write_tables(report: EvaluationReport, folder: Path) -> None:
    """`table.txt`, `table.md` and `table.tex`."""
    for name, text in (("txt", table(report) + "\n"), ("md", markdown(report)), ("tex", latex(report))):
        write_whole(folder / f"table.{name}", text)


def sections(report: EvaluationReport) -> list[tuple[str, list[TableRow]]]:
    """The ceiling, each table's systems and then the codecs by others in it, and the floors; none that is empty."""
    wanted: list[tuple[str, str, str]] = [("Ceiling", "ceiling", "")]
    for rates in RATE_RANGES.values():
        wanted += [(rates.title, "system", rates.key), (f"{rates.title}: codecs by others", "baseline", rates.key)]
    wanted.append(("Floors", "floor", ""))
    found = [(title, _rows(report, role, table_)) for title, role, table_ in wanted]
    return [(title, rows) for title, rows in found if rows]


def _rows(report: EvaluationReport, role: str, table_: str) -> list[TableRow]:
    digits = {column["key"]: _digits(report, column) for column in _columns(report)}
    rows = []
    for system in report["systems"]:
        if system["role"] != role or (table_ and system["table"] != table_):
            continue
        scores = report["results"].get(system["key"], {})
        kbps = "" if system["payload_kbps"] is None else f"{system['payload_kbps']:.3f}"
        kbps += f" ({system['coded_kbps']:.3f} entropy-coded)" if system.get("coded_kbps") else ""
        cells = [_cell(scores.get(key) or {}, digits[key]) for key in digits]
        rows.append(TableRow(system["title"], kbps, cells, system["unavailable"], system["licence"]))
    return rows


def _cell(score: Mapping[str, Any], digits: int) -> Cell:
    if score.get("mean") is None:
        return Cell()
    low, high = score.get("ci") or (None, None)
    half = "" if low is None or high is None else f"{(high - low) / 2:.{digits}f}"
    control = "" if score.get("control") is None else f"{score['control']:.{digits}f}"
    good = bool(score.get("best")) or score.get("significant") is False
    return Cell(f"{score['mean']:.{digits}f}", half, control, good)


def _columns(report: EvaluationReport) -> list[Mapping[str, Any]]:
    """The figures, and the spread of decodes where there are several."""
    variability = report["variability"]
    return [*report["figures"], *([variability["figure"]] if variability["systems"] else [])]


def _digits(report: EvaluationReport, column: Mapping[str, Any]) -> int:
    """Behind the point: the figure's own, or about three that count in the column's median."""
    if column["digits"] is not None:
        return column["digits"]
    means = [abs(score[column["key"]]["mean"] or 0) for score in report["results"].values() if column["key"] in score]
    middle = statistics.median(means) if means else 0.0
    return 2 if middle == 0 else min(4, max(0, 2 - math.floor(math.log10(middle))))


def _note(row: TableRow) -> str:
    parts = [f"not available: {row.unavailable}" if row.unavailable else "", row.licence and f"licence {row.licence}"]
    return "; ".join(filter(None, parts))


def _unit_and_way(column: Mapping[str, Any]) -> str:
    way = {"lower": "↓", "higher": "↑"}.get(column["better"], "")
    return f"({', '.join(filter(None, [column['unit'], way]))})" if column["unit"] or way else ""


def _latex_head(column: Mapping[str, Any], embedding: str) -> str:
    way = {"lower": r"$\downarrow$", "higher": r"$\uparrow$"}.get(column["better"], "")
    name = _SHORT.get(column["key"], column["title"]).format(embedding=embedding)
    return " ".join(filter(None, [_escaped(name), way]))


def _caption(report: EvaluationReport) -> str:
    return (
        f"{report['recipe']}: {report['subtitle']}. Mean ± half of the 95 % bootstrap interval over clips; in brackets "
        f"the same decoded from another clip's z. Bold: best of its table, or not significantly worse."
    )


def _sets(report: EvaluationReport) -> str:
    return f"distances of sets over {report['embedding']}"


def _plain(text: str) -> str:
    """A cell of Markdown stays one."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_SPECIAL.get(letter, letter) for letter in " ".join(text.split()))
