"""The table of figures: a row a system, a column a figure, with how sure each is and what a wrong z would give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trainer.page.html import NOTHING, Html, element, explained, is_number, join, scrolling, signed
from trainer.page.system_cells import TABLES, EvaluationReport, SystemEntry, system_name, with_role

FigureInfo = Mapping[str, Any]

_RATE_NOTE = (
    "Of the codes alone; beneath it what they take entropy-coded, where the codec has a prior, and what the files "
    "take, measured by their sizes, headers and all."
)


def lead(report: EvaluationReport) -> str:
    """What the numbers in the table are."""
    results = [result for results in report["results"].values() for result in results.values()]
    with_interval = any(_interval(result) for result in results)
    spread = "95 % confidence interval" if with_interval else "standard deviation over the clips"
    parts = [f"Mean and {spread}."]
    if any(is_number(result.get("control")) for result in results):
        parts.append(
            "In brackets the same figure where another clip's z was decoded: what lies between, z has carried."
        )
    parts.append("Within each range of rates the best is marked; ceilings and floors do not compete.")
    if any(result.get("significant") is False for result in results):
        parts.append("≈ cannot be told apart from the best.")
    return " ".join(parts)


def figure_table(report: EvaluationReport) -> Html:
    """Ceilings, then systems and other codecs by their range of rates, then floors; unavailable ones say why."""
    columns = [_Column(report, figure) for figure in report["figures"]]
    with_rate = any(system.get("payload_kbps") for system in report["systems"])
    head = [element("th", "System", scope="col")]
    if with_rate:
        head.append(element("th", explained("Bit rate", _RATE_NOTE), element("small", "kbps"), scope="col"))
    head += [column.heading() for column in columns]
    width = 1 + with_rate + sum(column.width for column in columns)
    groups = [
        _rows(title, systems, columns, role=role, width=width, with_rate=with_rate)
        for title, role, systems in _groups(report)
    ]
    table = element("table", element("thead", element("tr", *head)), *groups, class_="figures")
    return scrolling(table, "Table of figures")


def _groups(report: EvaluationReport) -> Iterable[tuple[str, str, list[SystemEntry]]]:
    """Title, role and systems of each group of rows that has any."""
    groups: list[tuple[str, str, Sequence[SystemEntry]]] = [
        ("Original", "original", with_role(report, "original")),
        ("Ceiling: the best that a codec built on it can do", "ceiling", with_role(report, "ceiling")),
    ]
    for table in TABLES:
        groups.append((table.title, "system", with_role(report, "system", table)))
        groups.append((f"{table.title}: other codecs", "baseline", with_role(report, "baseline", table)))
    groups.append(("Floors: what ignores the clip", "floor", with_role(report, "floor")))
    for title, role, systems in groups:
        shown = [s for s in systems if report["results"].get(s["key"]) or s.get("unavailable")]
        if shown:
            yield title, role, shown


def _rows(
    title: str, systems: Sequence[SystemEntry], columns: Sequence[_Column], *, role: str, width: int, with_rate: bool
) -> Html:
    rows = [element("tr", element("th", element("span", title), colspan=width, scope="rowgroup"), class_="role")]
    for system in systems:
        cells = [element("th", system_name(system), scope="row")]
        if with_rate:
            cells.append(_rate_cell(system))
        if system.get("unavailable"):
            rest = width - len(cells)
            reason = element("span", f"Not available: {system['unavailable']}")
            cells += [element("td", reason, colspan=rest, class_="reason")] if rest else []
        else:
            cells += [cell for column in columns for cell in column.cells(system)]
        rows.append(element("tr", *cells))
    return element("tbody", *rows, class_=f"role-{role}")


def _rate_cell(system: SystemEntry) -> Html:
    if not system.get("payload_kbps"):
        return _empty_cell()
    told = (("coded_kbps", "entropy-coded"), ("file_kbps", "in files"))
    more = [element("small", f"{system[key]:.3g} {what}") for key, what in told if system.get(key)]
    return element("td", f"{system['payload_kbps']:.3g}", *more, class_="rate")


class _Column:
    """A figure of all systems, and beside it the one of the control where there is any."""

    def __init__(self, report: EvaluationReport, figure: FigureInfo) -> None:
        self.figure = figure
        self.results = {key: results.get(figure["key"]) or {} for key, results in report["results"].items()}
        self.means = means_of(report, figure)
        self.has_control = any(is_number(result.get("control")) for result in self.results.values())
        self.width = 1 + self.has_control
        self.digits = figure.get("digits") or _digits(self.means.values())
        self.best = _best_keys(report, figure, self.means)

    def heading(self) -> Html:
        figure = self.figure
        unit = " ".join(filter(None, [figure["unit"], "↓" if figure["better"] == "lower" else "↑"]))
        note = f"{figure['better'].capitalize()} is better. {figure.get('note') or ''}".strip()
        spanned = self.width if self.has_control else None
        title = join([explained(figure["title"], note), element("small", unit)])
        return element("th", title, scope="col", colspan=spanned, class_="with-control" if spanned else None)

    def cells(self, system: SystemEntry) -> list[Html]:
        cells = [self._value(system["key"])]
        if self.has_control:
            control = self.results.get(system["key"], {}).get("control")
            cells.append(element("td", f"({self._text(control)})" if is_number(control) else None, class_="control"))
        return cells

    def _value(self, key: str) -> Html:
        if key not in self.means:
            return _empty_cell()
        text, result = self._text(self.means[key]), self.results[key]
        if key in self.best:
            return element("td", element("strong", text, title="Best in its range of rates"), self._spread(result))
        near = result.get("significant") is False
        alike = element("abbr", "≈", title="Cannot be told apart from the best") if near else None
        return element("td", alike, text, self._spread(result))

    def _spread(self, result: Mapping[str, Any]) -> Html | None:
        interval = _interval(result)
        if interval:
            return element("small", f"[{', '.join(map(self._text, interval))}]")
        deviation = result.get("std")
        return element("small", f"± {self._text(deviation)}") if is_number(deviation) else None

    def _text(self, value: float) -> str:
        return signed(value, self.digits)


def means_of(report: EvaluationReport, figure: FigureInfo) -> dict[str, float]:
    """The means of a figure by system, without those that are missing or not finite."""
    means = {key: (results.get(figure["key"]) or {}).get("mean") for key, results in report["results"].items()}
    return {key: mean for key, mean in means.items() if is_number(mean)}


def best_of(figure: FigureInfo) -> Callable[..., Any]:
    """`min` or `max`: which of several values is the best."""
    return min if figure["better"] == "lower" else max


def _best_keys(report: EvaluationReport, figure: FigureInfo, means: Mapping[str, float]) -> set[str]:
    """The best of each range of rates, other codecs among its rivals; none where there is no rival."""
    best = set()
    for table in TABLES:
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
    """Digits after the point, alike in a column: about three that count in its largest value."""
    largest = max((abs(mean) for mean in means), default=0.0)
    return 3 if largest < 1 else 2 if largest < 10 else 1 if largest < 1000 else 0


def _empty_cell() -> Html:
    return element("td", NOTHING, class_="nothing")
