"""The chart of what a bit is worth: log-mel against bits a vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.page.curves import Axis, levels
from trainer.page.html import Html, count, element, section
from trainer.page.system_cells import EvaluationReport

_WIDTH, _HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 28, 414, 12, 238  # the plot's edges within the chart
_LINES = {"autoencoder": "AudioAE alone", "z": "continuous z"}
"""Systems that are drawn as lines. Another clip's z is not: it lies so far above that the curve would look flat."""
_CONTROL = "another clip's z"


def bits_section(report: EvaluationReport) -> Html | None:
    """Return the section with the chart; None if the report has no curve."""
    curve = report.get("curve")
    if not curve:
        return None
    lead = (
        "How near decodes come to the original with the first codebooks alone, over the "
        f"{count(curve['clips'], 'clip')} of this page, with 95 % intervals. A bit that is heard lowers the curve. "
        f"99 % of the variance of z lies in {count(curve['z_rank'], 'direction')} of its {curve['channels']} channels."
    )
    parts = [_chart(curve), _legend(curve), _numbers(curve)]
    figure = element("figure", element("div", *parts, class_="bits"), class_="measure")
    return section("What a bit is worth", lead, figure, id="bits")


def _chart(curve: Mapping[str, Any]) -> Html:
    points, lines = curve["points"], curve["lines"]
    shown = [*points, *(lines[key] for key in _LINES)]
    bounds = [bound for each in shown for bound in (each["ci"] or (each["mean"], each["mean"]))]
    margin = 0.06 * (max(bounds) - min(bounds)) or 0.5
    x_axis = Axis(0, 1.04 * points[-1]["bits"], _LEFT, _RIGHT)
    y_axis = Axis(max(0.0, min(bounds) - margin), max(bounds) + margin, _BOTTOM, _TOP)
    parts = [*_grid(x_axis, y_axis), *(_level(name, lines[key], y_axis) for key, name in _LINES.items())]
    places = " ".join(f"{x_axis.place(p['bits']):.1f},{y_axis.place(p['mean']):.1f}" for p in points)
    parts.append(element("polyline", points=places, class_="main"))
    for point in points:
        parts += _point(point, x_axis, y_axis)
    first, last = points[0], points[-1]
    what = f"Log-mel distance: {first['mean']:.2f} dB at {first['bits']} bits, {last['mean']:.2f} dB at {last['bits']}"
    return element("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=what)


def _grid(x_axis: Axis, y_axis: Axis) -> list[Html]:
    parts = levels(y_axis, left=_LEFT, right=_RIGHT)
    for tick in x_axis.ticks():
        parts.append(element("text", f"{tick:g}", x=f"{x_axis.place(tick):.1f}", y=_BOTTOM + 18, class_="x"))
    parts.append(element("text", "bits per vector z", x=(_LEFT + _RIGHT) / 2, y=_HEIGHT - 6, class_="x"))
    return parts


def _level(name: str, line: Mapping[str, Any], y_axis: Axis) -> Html:
    """Draw a system that does not depend on the bits as a horizontal line with its name below.

    The names stand at different ends, so that they do not meet where the lines are near each other.
    """
    y = y_axis.place(line["mean"])
    x, side = (_RIGHT, "name") if name == _LINES["z"] else (_LEFT, "name left")
    drawn = element("line", x1=_LEFT, x2=_RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="level")
    return element("g", drawn, element("text", name, x=x, y=f"{y + 13:.1f}", class_=side))


def _point(point: Mapping[str, Any], x_axis: Axis, y_axis: Axis) -> list[Html]:
    x, parts = f"{x_axis.place(point['bits']):.1f}", []
    if point["ci"] is not None:
        low, high = (f"{y_axis.place(bound):.1f}" for bound in point["ci"])
        parts.append(element("line", x1=x, x2=x, y1=low, y2=high, class_="interval"))
    title = element("title", f"{point['bits']} bits, {point['kbps']:.3f} kbps: {point['mean']:.2f} dB")
    parts.append(element("circle", title, cx=x, cy=f"{y_axis.place(point['mean']):.1f}", r=4))
    return parts


def _legend(curve: Mapping[str, Any]) -> Html:
    other = f"{_CONTROL} gives {curve['lines']['z_other']['mean']:.1f} dB"
    return element("p", element("span", "log-mel distance in dB, lower is better"), other, class_="legend")


def _numbers(curve: Mapping[str, Any]) -> Html:
    heads = ("bits", "kbps", "dB", "95 % interval", "another clip's codes")
    rows = [element("tr", *(element("th", head, scope="col") for head in heads))]
    for point in curve["points"]:
        rows.append(_row(str(point["bits"]), f"{point['kbps']:.3f}", point))
    named = {**_LINES, "z_other": _CONTROL}
    rows += [_row(name, "", curve["lines"][key]) for key, name in named.items()]
    return element("details", element("summary", "The numbers"), element("table", *rows))


def _row(name: str, kbps: str, each: Mapping[str, Any]) -> Html:
    interval = "" if each["ci"] is None else "{:.2f} to {:.2f}".format(*each["ci"])
    control = f"{each['control']:.2f}" if "control" in each else ""
    return element("tr", *(element("td", text) for text in (name, kbps, f"{each['mean']:.2f}", interval, control)))
