"""Charts of the loss of each stage, and the axis of all charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from trainer.page.html import Html, element
from trainer.run_documents import metrics_lines, warn_of

CHART_WIDTH, CHART_HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 352, 8, 200  # the plot's edges within the chart
_MOST_POINTS = 300
_MOST_LOSS = 1e30  # a larger loss, as of a run that diverges, is left out of the chart, whose scale it would overflow
_LOG_FROM_RATIO = 8.0  # the loss axis is logarithmic if highest / lowest is at least this


Line = list[tuple[int, float]]
"""Points of a line: samples seen and loss."""


@dataclass(frozen=True)
class Point:
    """The loss after a number of samples; values that were not logged are None."""

    samples: int
    loss: float | None
    smooth: float | None
    by_noise: tuple[float | None, ...]
    """The loss at each noise level, from low to high."""


@dataclass(frozen=True)
class Axis:
    """Maps values to positions in the picture, linearly or logarithmically, and chooses the ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return the position of a value in the picture."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Return about five round values within the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 200 else (1,)
            return [v for v in (step * 10.0**d for d in decades for step in steps) if self.low <= v <= self.high]
        step = _round_step((self.high - self.low) / 4)
        return [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def read_curve(path: Path) -> list[Point]:
    """Read the training lines of a metrics.jsonl, averaged down to at most as many points as a chart shows.

    Lines of other kinds are skipped, and so are damaged ones, with a warning. After a resume from an earlier
    checkpoint, repeated lines replace the older ones. A missing file gives no points.
    """
    points: list[Point] = []
    lines = metrics_lines(path)
    for line in lines:
        if line["kind"] == "train":
            point = _point(line)
            while points and points[-1].samples >= point.samples:
                points.pop()
            points.append(point)
    warn_of(lines)
    return _thin(points)


def read_held_out(path: Path) -> Line:
    """Read the held-out losses of a metrics.jsonl as (samples, loss), by the same rules as `read_curve`."""
    points: Line = []
    lines = metrics_lines(path)
    for line in lines:
        loss = _finite(line.get("loss"))
        if line["kind"] == "held_out" and loss is not None:
            while points and points[-1][0] >= line["samples"]:
                points.pop()
            points.append((line["samples"], loss))
    warn_of(lines)
    return points


def smoothed_loss(points: Sequence[Point]) -> Line:
    """Return the smoothed loss as (samples, loss): the logged average, or else one that is computed here."""
    logged = [(p.samples, p.smooth) for p in points if p.smooth is not None]
    return logged or _smoothed([(p.samples, p.loss) for p in points if p.loss is not None])


def loss_chart(stage: str, points: Sequence[Point]) -> Html | None:
    """Return a chart of the loss over the samples seen, or None if there are fewer than two points."""
    raw = [(p.samples, p.loss) for p in points if p.loss is not None]
    main = smoothed_loss(points)
    if len(main) < 2:
        return None
    levels = max(len(p.by_noise) for p in points)
    by_noise = [[(p.samples, v) for p in points if (v := _at(p.by_noise, n)) is not None] for n in range(levels)]
    x_axis, y_axis = axes_of([main, raw, *by_noise])
    lines = [
        polyline(line, x_axis, y_axis, "noise", f"--level: {level / max(1, levels - 1):.2f}")
        for level, line in enumerate(by_noise)
    ]
    lines += [polyline(raw, x_axis, y_axis, "raw"), polyline(main, x_axis, y_axis, "main")]
    last_samples, last_loss = main[-1]
    what = f"Loss of stage {stage}: {last_loss:.3g} after {short(last_samples)} samples"
    view = f"0 0 {CHART_WIDTH} {CHART_HEIGHT}"
    svg = element("svg", *grid(x_axis, y_axis), *lines, viewBox=view, role="img", aria_label=what)
    numbers = element("span", f"{last_loss:.3g} after {short(last_samples)} samples")
    return element("figure", element("figcaption", element("b", stage), numbers), svg, _legend(any(by_noise)))


# ---- drawing


def axes_of(lines: Sequence[Sequence[tuple[float, float]]]) -> tuple[Axis, Axis]:
    """Return the axes of a chart of these lines; the vertical one is logarithmic if the values span a wide range."""
    losses = [loss for line in lines for _, loss in line]
    samples = [seen for line in lines for seen, _ in line]
    low, high = min(losses), max(losses)
    log = low > 0 and high / low >= _LOG_FROM_RATIO
    margin = 0.04 * (high - low) or 0.5
    bounds = (low / 1.1, high * 1.1) if log else (low - margin, high + margin)
    return Axis(0, max(samples), _LEFT, _RIGHT), Axis(*bounds, _BOTTOM, _TOP, log=log)


def _smoothed(line: Sequence[tuple[int, float]]) -> Line:
    """Return an exponential moving average over about a twentieth of the line, corrected for its start."""
    keep = 1 - 1 / max(1, len(line) / 20)
    total, weight, smooth = 0.0, 0.0, []
    for samples, loss in line:
        total, weight = keep * total + loss, keep * weight + 1
        smooth.append((samples, total / weight))
    return smooth


def polyline(
    points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis, kind: str, style: str | None = None
) -> Html:
    """Draw a line through points; `kind` is its class in page.css."""
    places = " ".join(f"{x_axis.place(samples):.1f},{y_axis.place(loss):.1f}" for samples, loss in points)
    return element("polyline", points=places, class_=kind, style=style)


def grid(x_axis: Axis, y_axis: Axis, *, title: str = "samples seen") -> list[Html]:
    """Draw the ticks of both axes with their numbers, and the title of the horizontal one."""
    return [
        *levels(y_axis, left=_LEFT, right=_RIGHT),
        *(element("text", short(t), x=f"{x_axis.place(t):.1f}", y=_BOTTOM + 17, class_="x") for t in x_axis.ticks()),
        element("text", title, x=(_LEFT + _RIGHT) / 2, y=CHART_HEIGHT - 4, class_="x"),
    ]


def levels(y_axis: Axis, *, left: float, right: float) -> list[Html]:
    """Draw a line at each tick of a chart's vertical axis, from edge to edge of the plot, with its number."""
    parts = []
    for tick in y_axis.ticks():
        y = f"{y_axis.place(tick):.1f}"
        parts.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(element("text", f"{tick:g}", x=left - 8, y=y, class_="y"))
    return parts


def _legend(with_noise: bool) -> Html:
    entries = [element("span", "smoothed", class_="main"), element("span", "raw", class_="raw")]
    if with_noise:
        entries.append(element("span", "low to high noise level", class_="noise"))
    return element("p", *entries, class_="legend")


def _round_step(step: float) -> float:
    """Round a step up to the next of 1, 2, 5, 10, 20, …"""
    decade = 10.0 ** math.floor(math.log10(step))
    return next(factor * decade for factor in (1, 2, 5, 10) if factor * decade >= step * 0.999)


def short(samples: float) -> str:
    """Format a number of samples: 12800 → 12.8k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if samples >= size:
            return f"{samples / size:.3g}{unit}"
    return f"{samples:g}"


# ---- reading


def _point(line: Mapping[str, Any]) -> Point:
    by_noise = tuple(_finite(loss) for loss in line.get("loss_bins") or ())
    return Point(line["samples"], _finite(line.get("loss")), _finite(line.get("loss_ema")), by_noise)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and abs(value) < _MOST_LOSS else None


def _thin(points: Sequence[Point]) -> list[Point]:
    """Average neighbouring points so that at most `_MOST_POINTS` remain."""
    size = math.ceil(len(points) / _MOST_POINTS)
    return [_mean_point(points[i : i + size]) for i in range(0, len(points), size)] if size > 1 else list(points)


def _mean_point(points: Sequence[Point]) -> Point:
    levels = max(len(p.by_noise) for p in points)
    by_noise = tuple(_mean([_at(p.by_noise, level) for p in points]) for level in range(levels))
    return Point(points[-1].samples, _mean([p.loss for p in points]), _mean([p.smooth for p in points]), by_noise)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _at(values: Sequence[float | None], index: int) -> float | None:
    return values[index] if index < len(values) else None
