"""Charts with a line for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.compare.comparison import Comparison
from trainer.page.curves import CHART_HEIGHT, CHART_WIDTH, axes_of, grid, polyline
from trainer.page.html import Html, element

_HUES = (310, 205, 32, 145, 262, 8)
"""Hues that people with any kind of colour vision can tell apart, most of all in this order."""
_DASHES = ("none", "6 4", "2 3")
"""Further runs repeat the hues with broken lines."""

Lines = Mapping[str, Sequence[tuple[float, float]]]
"""Points (x, y) by the label of the run."""


def loss_charts(comparison: Comparison) -> list[Html]:
    """Return the charts of the training loss and the held-out loss of each stage that two runs or more have."""
    charts = []
    for stage in dict.fromkeys(stage for run in comparison.runs for stage in run.stages):
        having = [run for run in comparison.runs if stage in run.stages]
        training = {run.label: run.stages[stage].training for run in having}
        held_out = {run.label: run.stages[stage].held_out_curve for run in having}
        charts += [chart(comparison, f"{stage}, training loss", training, "samples seen")]
        charts += [chart(comparison, f"{stage}, held-out loss", held_out, "samples seen")]
    return [each for each in charts if each]


def rate_chart(comparison: Comparison) -> Html | None:
    """Return the chart of log-mel against the rate of the first codebooks alone; None unless two runs have one."""
    lines = {
        run.label: [(point["kbps"], point["mean"]) for point in curve["points"]]
        for run in comparison.runs
        if run.report is not None and (curve := run.report.get("curve"))
    }
    return chart(comparison, "Log-mel distance, dB", lines, "kbps")


def chart(comparison: Comparison, title: str, lines: Lines, horizontal: str) -> Html | None:
    """Return a chart of the lines that have two points or more; None if there are fewer than two such lines."""
    drawn = {label: points for label, points in lines.items() if len({x for x, _ in points}) > 1}
    if len(drawn) < 2:
        return None
    x_axis, y_axis = axes_of(list(drawn.values()))
    numbers = {run.label: number for number, run in enumerate(comparison.runs)}
    parts = [polyline(points, x_axis, y_axis, "run", style(numbers[label])) for label, points in drawn.items()]
    ends = "; ".join(f"{label} {points[-1][1]:.3g}" for label, points in drawn.items())
    svg = element(
        "svg", *grid(x_axis, y_axis, title=horizontal), *parts,
        viewBox=f"0 0 {CHART_WIDTH} {CHART_HEIGHT}", role="img", aria_label=f"{title}, at the end: {ends}",
    )  # fmt: skip
    return element("figure", element("figcaption", element("b", title)), svg, _legend(drawn, numbers))


def style(number: int) -> str:
    """Return the CSS properties with the colour and the dashes of a run's line."""
    turn, hue = divmod(number, len(_HUES))
    return f"--run: {_HUES[hue]}; --dash: {_DASHES[turn % len(_DASHES)]}"


def _legend(lines: Lines, numbers: Mapping[str, int]) -> Html:
    entries = [
        element("span", f"{label} ", element("b", f"{points[-1][1]:.3g}"), class_="run", style=style(numbers[label]))
        for label, points in lines.items()
    ]
    return element("p", *entries, class_="legend runs")
