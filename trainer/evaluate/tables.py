"""Renders the report as tables: text for a terminal, Markdown, and LaTeX for a paper.

A cell shows the mean, ± half of its 95 % interval and, in brackets, the same figure of decodes from another clip's z.
The best system of a table and all that do not differ significantly from it are bold (in text: marked with a star).
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
from trainer.file_names import printable
from trainer.formatting import aligned, in_markdown

_NOTHING = "–"
_SHORT = {
    "log_mel": "Log-mel",
    "mrstft": "MR-STFT",
    "lsd": "LSD",
    "denoising": "Denoising",
    "frechet": "FD ({embedding})",
    "kernel": "KD ({embedding})",
    "retrieval": "Retrieval ({embedding})",
    "spread": "Spread",
}
"""Short column heads for LaTeX, for figures whose title is long."""
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
    "`": r"\`{}",
    **{sign: f"{{{sign}}}" for sign in "[]*"},  # at the start of a row, LaTeX takes them for options of the row before
}


@dataclass(frozen=True)
class Cell:
    """One figure of one system, as text; `mean` is empty if there is no value."""

    mean: str = ""
    half: str = ""
    control: str = ""
    good: bool = False
    """Whether this is the best of its table, or not significantly worse."""

    @property
    def plain(self) -> str:
        """The cell for a terminal."""
        if not self.mean:
            return ""
        parts = [self.mean + ("*" if self.good else ""), f"±{self.half}" if self.half else ""]
        return " ".join(filter(None, [*parts, f"[{self.control}]" if self.control else ""]))

    @property
    def markdown(self) -> str:
        """The cell in Markdown, bold if it is good."""
        if not self.mean:
            return _NOTHING
        mean = f"**{self.mean}**" if self.good else self.mean
        half, control = (f" ± {self.half}" if self.half else ""), (f" [{self.control}]" if self.control else "")
        return mean + half + control

    @property
    def latex(self) -> str:
        """The cell in math mode, which prints a true minus sign."""
        if not self.mean:
            return "--"
        mean = rf"\mathbf{{{self.mean}}}" if self.good else self.mean
        half, control = (rf" \pm {self.half}" if self.half else ""), (f"\\;[{self.control}]" if self.control else "")
        return f"${mean}{half}{control}$"


@dataclass(frozen=True)
class TableRow:
    """One system's row in a table."""

    title: str
    kbps: str
    cells: list[Cell]
    unavailable: str
    licence: str


def table(report: EvaluationReport) -> str:
    """Render a table for a terminal: one line for each system, in sections."""
    columns = _columns(report)
    lines = [["system", "kbps", *(f"{column['key']} {column['unit']}".strip() for column in columns)]]
    notes = []
    for title, rows in sections(report):
        lines.append([f"-- {title}", *[""] * (len(columns) + 1)])
        lines += [[row.title, row.kbps, *(cell.plain for cell in row.cells)] for row in rows if not row.unavailable]
        notes += [f"{row.title}: not available, {row.unavailable}" for row in rows if row.unavailable]
    speed = report["speed"]
    speed_line = (
        f"speed relative to real time: encode {speed['encode_realtime_factor']}×, decode "
        f"{speed['decode_realtime_factor']}× ({speed['steps']} steps, {speed['device']})"
    )
    chances = "".join(
        f"; {column['key']} by chance {_chance(column)} {column['unit']}".rstrip()
        for column in columns
        if _chance(column)
    )
    legend = (
        f"mean ± half of the 95 % interval [decoded from another clip's z]; embedding: {report['embedding']}{chances}; "
        "* best, or not significantly worse"
    )
    below = [printable(line) for line in (legend, *notes, *_of_z(report), speed_line)]
    return "\n".join([aligned(lines, right=range(1, len(lines[0]))), *below])


def markdown(report: EvaluationReport) -> str:
    """Render Markdown tables for a README or an issue, one for each section."""
    columns = _columns(report)
    parts = [f"## {in_markdown(report['recipe'])}", f"{in_markdown(report['subtitle'])}."]
    titles = [f"{column['title']} {_unit_and_way(column)}".strip() for column in columns]
    head = ["System", "kbps", *map(in_markdown, titles)]
    for title, rows in sections(report):
        lines = [head, ["---", *["--:"] * (len(head) - 1)]]
        for row in rows:
            shown = [cell.markdown for cell in row.cells] if not row.unavailable else [_NOTHING] * len(columns)
            named = row.title + (" (not available)" if row.unavailable else "")
            lines.append([in_markdown(named), row.kbps or _NOTHING, *shown])
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        notes = [f"* {in_markdown(row.title)}: {in_markdown(_note(row))}" for row in rows if _note(row)]
        parts += [f"### {title}", text, *(["\n".join(notes)] if notes else [])]
    parts += _bits_in_markdown(report)
    parts.append(
        "Each cell shows the mean ± half of the 95 % interval (bootstrap over clips), and in brackets the mean of the "
        "same system decoded from another clip's z. The best system of each table and all that do not differ "
        "significantly from it are bold. Distances between sets, and retrieval, are computed over "
        f"{in_markdown(report['embedding'])} embeddings."
    )
    return "\n\n".join(parts) + "\n"


def latex(report: EvaluationReport) -> str:
    """Render a `table*` for a paper, which needs the packages booktabs and graphicx."""
    columns = _columns(report)
    width = len(columns) + 2
    heads = ["System", "kbps", *(_latex_head(column, report["embedding"]) for column in columns)]
    units = ["", "", *(_escaped(_unit_and_chance(column)) for column in columns)]
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
    """Write `table.txt`, `table.md` and `table.tex` into the folder."""
    for name, text in (("txt", table(report) + "\n"), ("md", markdown(report)), ("tex", latex(report))):
        write_whole(folder / f"table.{name}", text)


def sections(report: EvaluationReport) -> list[tuple[str, list[TableRow]]]:
    """Return title and rows of each section that is not empty.

    The order is: the ceiling; for each range of bit rates our systems, then codecs by others; the floors.
    """
    wanted: list[tuple[str, str, str]] = [("Ceiling", "ceiling", "")]
    for rates in RATE_RANGES.values():
        wanted += [(rates.title, "system", rates.key), (f"{rates.title}: codecs by others", "baseline", rates.key)]
    wanted.append(("Floors", "floor", ""))
    found = [(title, _rows(report, role, table_)) for title, role, table_ in wanted]
    return [(title, rows) for title, rows in found if rows]


def _of_z(report: EvaluationReport) -> list[str]:
    """Return a line on the directions that z uses; none if the report does not say."""
    curve = report.get("curve")
    if not curve:
        return []
    return [f"99 % of the variance of z lies in {curve['z_rank']} directions of its {curve['channels']} channels"]


def _bits_in_markdown(report: EvaluationReport) -> list[str]:
    """Return the table of log-mel against bits a vector; nothing if the report has no curve."""
    curve = report.get("curve")
    if not curve:
        return []
    rows = [["Bits per vector", "kbps", "Log-mel (dB, ↓)"], ["--:", "--:", "--:"]]
    for point in curve["points"]:
        low, high = point["ci"] or (point["mean"], point["mean"])
        cell = Cell(f"{point['mean']:.2f}", f"{(high - low) / 2:.2f}", _control(point))
        rows.append([str(point["bits"]), f"{point['kbps']:.3f}", cell.markdown])
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return ["### What a bit is worth", f"Over the {curve['clips']} clips of the page. {_of_z(report)[0]}.", text]


def _control(point: Mapping[str, Any]) -> str:
    return "" if point.get("control") is None else f"{point['control']:.2f}"


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
    """Return the figures, and the spread of decodes if systems were decoded several times."""
    variability = report["variability"]
    return [*report["figures"], *([variability["figure"]] if variability["systems"] else [])]


def _digits(report: EvaluationReport, column: Mapping[str, Any]) -> int:
    """Return the digits after the point: the figure's own, or about three significant ones of the median."""
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
    parts = [*filter(None, [_unit_and_chance(column), way])]
    return f"({', '.join(parts)})" if parts else ""


def _unit_and_chance(column: Mapping[str, Any]) -> str:
    chance = _chance(column)
    return ", ".join(filter(None, [column["unit"], chance and f"chance {chance}"]))


def _chance(column: Mapping[str, Any]) -> str:
    """Return what guessing would reach; empty for a figure, or a report of an older release, that does not tell."""
    return "" if column.get("chance") is None else f"{column['chance']:.1f}"


def _latex_head(column: Mapping[str, Any], embedding: str) -> str:
    way = {"lower": r"$\downarrow$", "higher": r"$\uparrow$"}.get(column["better"], "")
    short = _SHORT.get(column["key"])
    # str.format would take the braces of a title for fields
    name = column["title"] if short is None else short.replace("{embedding}", embedding)
    return " ".join(filter(None, [_escaped(name), way]))


def _caption(report: EvaluationReport) -> str:
    return (
        f"{report['recipe']}: {report['subtitle']}. Each cell shows the mean ± half of the 95 % bootstrap interval "
        "over clips, and in brackets the mean of the same system decoded from another clip's z. Bold figures are the "
        "best of their table, or not significantly worse."
    )


def _escaped(text: str) -> str:
    """Escape text so that LaTeX prints it literally."""
    return "".join(_SPECIAL.get(letter, letter) for letter in printable(" ".join(text.split())))
