"""The table of figures: one row for each system, one column for each figure, with intervals and controls.

A window shows as many figures side by side as fit, in the order of the report. The other figures are folded away; once
unfolded, they stand in further lines of the system's row. The layout needs only HTML and CSS, no script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trainer.evaluate.systems import RATE_RANGES
from trainer.page.html import NOTHING, Html, element, explained, is_number, join, signed
from trainer.page.system_cells import EvaluationReport, SystemEntry, system_name, with_role

FigureInfo = Mapping[str, Any]

_RATE_NOTE = (
    "The large number is the rate of the codes alone. The numbers below it are the rate of the entropy-coded codes, if "
    "the codec has a prior, and the rate of the files including their headers."
)
_ALWAYS_SHOWN = 2
"""Number of figures that fit the narrowest window; they stand below the system's name."""
_THREE_FIGURES_EM = 24
"""From this width on, three figures fit below the name."""
_BESIDE_EM, _FIGURE_EM = 22.4, 7.2
"""Four or more figures stand to the right of name and rate: widths of name, rate and margins, and of a figure."""


def lead(report: EvaluationReport) -> str:
    """Return the sentences above the table, which explain its numbers."""
    results = [result for results in report["results"].values() for result in results.values()]
    with_interval = any(_interval(result) for result in results)
    spread = "95 % confidence interval" if with_interval else "standard deviation over the clips"
    parts = [f"Each cell shows the mean and the {spread}."]
    if any(is_number(result.get("control")) for result in results):
        parts.append(
            "In round brackets is the same figure if another clip's z is decoded; the difference shows what z carries."
        )
    parts.append("The best system within each range of rates is marked; ceilings and floors do not compete.")
    if any(result.get("significant") is False for result in results):
        parts.append("The sign ≈ marks values that do not differ significantly from the best.")
    return " ".join(parts)


def figure_table(report: EvaluationReport) -> Html:
    """Return the table: ceilings, then systems and other codecs by range of rates, then floors.

    The row of a system that is not available shows the reason.
    """
    columns = [_Column(report, figure, number) for number, figure in enumerate(report["figures"], start=1)]
    with_rate = any(system.get("payload_kbps") for system in report["systems"])
    head = [element("th", "System", scope="col")]
    if with_rate:
        rate = [explained("Bit rate", _RATE_NOTE), element("small", "kbps")]
        head.append(element("th", *rate, scope="col", class_="rate"))
    if _folds(report):
        head.append(element("td", class_="unfold"))
    head += [column.heading() for column in columns]
    groups = [
        _rows(title, systems, columns, role=role, width=len(head), with_rate=with_rate)
        for title, role, systems in _groups(report)
    ]
    class_ = "figures measure with-rate" if with_rate else "figures measure"
    table = element("table", element("thead", element("tr", *head)), *groups, class_=class_)
    unfold = element("details", element("summary", _all_figures(columns)), class_="unfold-all measure")
    return join([unfold if _folds(report) else None, table])


def style(report: EvaluationReport) -> str:
    """Return CSS that sets how many figures stand side by side at each window width, and folds the others.

    Widths are in em, so that fewer figures stand side by side if the reader's font is larger. In print, all are shown.
    """
    if not _folds(report):
        return ""
    count = len(report["figures"])
    rules = [_style_of(number) for number in range(_ALWAYS_SHOWN + 1, count + 1)]
    nothing_folded = ".unfold-all, .figures .unfold { display: none; } .figures { --indent: 0; }"
    return "".join([*rules, f"@media print, (min-width: {_needed_em(count):g}em) {{ {nothing_folded} }}\n"])


def _folds(report: EvaluationReport) -> bool:
    """Whether there are more figures than the narrowest window shows."""
    return len(report["figures"]) > _ALWAYS_SHOWN


def _needed_em(number: int) -> float:
    """Return the width of a window in em at which this many figures fit side by side."""
    return _THREE_FIGURES_EM if number == _ALWAYS_SHOWN + 1 else _BESIDE_EM + number * _FIGURE_EM


def _style_of(number: int) -> str:
    """Return CSS of one figure: it stands in the first line if it fits; otherwise it is folded, and then labelled."""
    needed = _needed_em(number)
    narrower = f"(max-width: {needed - 0.01:g}em)"
    folded = f".unfold-all:not([open]) + .figures tr:not(:has([open])) > .figure-{number}"
    return (
        f"@media (min-width: {needed:g}em) {{ .figures {{ --side-by-side: {number}; }} }}\n"
        f"@media {narrower} {{ .figures td.figure-{number}::before {{ display: block; }} }}\n"
        f"@media screen and {narrower} {{ {folded} {{ display: none; }} }}\n"
    )


def _all_figures(columns: Sequence[_Column]) -> str:
    return f"All {len(columns)} figures"


def _groups(report: EvaluationReport) -> Iterable[tuple[str, str, list[SystemEntry]]]:
    """Yield title, role and systems of each group of rows that is not empty."""
    groups: list[tuple[str, str, Sequence[SystemEntry]]] = [
        ("Original", "original", with_role(report, "original")),
        ("Ceiling: no codec built on it can be better", "ceiling", with_role(report, "ceiling")),
    ]
    for table in RATE_RANGES.values():
        groups.append((table.title, "system", with_role(report, "system", table)))
        groups.append((f"{table.title}: other codecs", "baseline", with_role(report, "baseline", table)))
    groups.append(("Floors: decodes that ignore the clip", "floor", with_role(report, "floor")))
    for title, role, systems in groups:
        shown = [s for s in systems if report["results"].get(s["key"]) or s.get("unavailable")]
        if shown:
            yield title, role, shown


def _rows(
    title: str, systems: Sequence[SystemEntry], columns: Sequence[_Column], *, role: str, width: int, with_rate: bool
) -> Html:
    rows = [element("tr", element("th", title, colspan=width, scope="rowgroup"), class_="role")]
    for system in systems:
        cells = [element("th", system_name(system), scope="row")]
        if with_rate:
            cells.append(_rate_cell(system))
        if system.get("unavailable"):
            columns_left = width - len(cells)
            reason = f"Not available: {system['unavailable']}"
            cells += [element("td", reason, colspan=columns_left, class_="reason")] if columns_left else []
        else:
            cells += [_unfold_cell(system, columns)] if len(columns) > _ALWAYS_SHOWN else []
            cells += [column.cell(system) for column in columns]
        rows.append(element("tr", *cells))
    return element("tbody", *rows, class_=f"role-{role}")


def _rate_cell(system: SystemEntry) -> Html:
    label = "Bit rate, kbps"
    if not system.get("payload_kbps"):
        return _labelled_cell(label, [NOTHING], class_="rate nothing")
    further = (("coded_kbps", "entropy\N{NON-BREAKING HYPHEN}coded"), ("file_kbps", "in files"))
    more = [element("small", f"{system[key]:.3g} {what}") for key, what in further if system.get(key)]
    return _labelled_cell(label, [f"{system['payload_kbps']:.3g}", *more], class_="rate")


def _labelled_cell(label: str, content: Iterable[object], *, class_: str) -> Html:
    """Return a cell whose label is shown if the cell does not stand below its column's head."""
    return element("td", element("span", *content), class_=class_, data_label=label)


def _unfold_cell(system: SystemEntry, columns: Sequence[_Column]) -> Html:
    """Return the cell that lies below a system's name and unfolds the system's figures on a press."""
    summary = element("summary", aria_label=f"{_all_figures(columns)} of {system['title']}")
    return element("td", element("details", summary), class_="unfold")


class _Column:
    """One figure of all systems."""

    def __init__(self, report: EvaluationReport, figure: FigureInfo, number: int) -> None:
        self.figure = figure
        self.class_ = f"figure-{number}"
        self.results = {key: results.get(figure["key"]) or {} for key, results in report["results"].items()}
        self.means = means_of(report, figure)
        self.way = "↓" if figure["better"] == "lower" else "↑"
        self.digits = figure.get("digits") or _digits(self.means.values())
        self.best = _best_keys(report, figure, self.means)

    def heading(self) -> Html:
        note = f"{self.figure['better'].capitalize()} is better. {self.figure.get('note') or ''}".strip()
        unit = " ".join(filter(None, [self.figure["unit"], self.way]))
        title = [explained(self.figure["title"], note), element("small", unit)]
        if is_number(chance := self.figure.get("chance")):
            title.append(element("small", f"chance: {self._text(chance)}"))
        return element("th", *title, scope="col", class_=self.class_)

    def cell(self, system: SystemEntry) -> Html:
        """Return the cell: the value, below it the interval or deviation, and the control's value in brackets."""
        key = system["key"]
        label = ", ".join(filter(None, [self.figure["title"], self.figure["unit"]])) + f"\N{NO-BREAK SPACE}{self.way}"
        if key not in self.means:
            return _labelled_cell(label, [NOTHING], class_=f"{self.class_} nothing")
        parts = [*self._value(key), self._spread(self.results[key]), self._control(self.results[key])]
        return _labelled_cell(label, parts, class_=self.class_)

    def _value(self, key: str) -> list[object]:
        text = self._text(self.means[key])
        if key in self.best:
            return [element("strong", text, title="Best in its range of rates")]
        if self.results[key].get("significant") is False:
            return [element("abbr", "≈", title="Does not differ significantly from the best"), text]
        return [text]

    def _spread(self, result: Mapping[str, Any]) -> Html | None:
        interval = _interval(result)
        if interval:
            return element("small", f"[{', '.join(map(self._text, interval))}]")
        deviation = result.get("std")
        return element("small", f"± {self._text(deviation)}") if is_number(deviation) else None

    def _control(self, result: Mapping[str, Any]) -> Html | None:
        control = result.get("control")
        return element("small", f"({self._text(control)})") if is_number(control) else None

    def _text(self, value: float) -> str:
        return signed(value, self.digits)


def means_of(report: EvaluationReport, figure: FigureInfo) -> dict[str, float]:
    """Return the means of a figure by system, without missing and infinite values."""
    means = {key: (results.get(figure["key"]) or {}).get("mean") for key, results in report["results"].items()}
    return {key: mean for key, mean in means.items() if is_number(mean)}


def best_of(figure: FigureInfo) -> Callable[..., Any]:
    """Return `min` or `max`, whichever selects the best value of a figure."""
    return min if figure["better"] == "lower" else max


def _best_keys(report: EvaluationReport, figure: FigureInfo, means: Mapping[str, float]) -> set[str]:
    """Return the best systems of each range of rates, other codecs included; none in a range of a single system."""
    best = set()
    for table in RATE_RANGES.values():
        systems = [s for role in ("system", "baseline") for s in with_role(report, role, table)]
        rivals = [s["key"] for s in systems if s["key"] in means]
        if len(rivals) > 1:
            chosen = best_of(figure)(means[key] for key in rivals)
            best |= {key for key in rivals if means[key] == chosen}
    return best


def _interval(result: Mapping[str, Any]) -> list[float] | None:
    bounds = result.get("ci")
    return list(bounds) if bounds and len(bounds) == 2 and all(map(is_number, bounds)) else None


def _digits(means: Iterable[float]) -> int:
    """Return the digits after the point in a column: about three significant digits of its largest value."""
    largest = max((abs(mean) for mean in means), default=0.0)
    return 3 if largest < 1 else 2 if largest < 10 else 1 if largest < 1000 else 0
