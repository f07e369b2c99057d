"""The charts of the losses: what is read from a run's metrics, and where it is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.page.test_page import Page
from trainer.page import curves as charts
from trainer.page.curves import loss_chart, read_curve
from trainer.page.html import document


def write_metrics(path: Path, lines: list[dict], torn: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn, encoding="utf-8")
    return path


def train_line(samples: int, loss: float | None = 1.0, **more: object) -> dict:
    return {"kind": "train", "samples": samples, "loss": loss, **more}


def draw(folder: Path, curves: dict[str, Path]) -> Page:
    """The charts of those stages that have one, as a page."""
    drawn = [loss_chart(stage, read_curve(path)) for stage, path in curves.items()]
    index = folder / "charts.html"
    index.write_text(document("charts", filter(None, drawn), style="", script=""))
    return Page(index)


def test_a_chart_a_stage_with_a_line_a_noise_level(tmp_path):
    bins = [[0.1, None, 0.3], None, [0.2, None, 0.4]]
    lines = [train_line(100 * (i + 1), 1 / (i + 1), loss_ema=0.9, loss_bins=b) for i, b in enumerate(bins)]
    curves = {
        "pretrain": write_metrics(tmp_path / "a.jsonl", [{"kind": "start", "samples": 0}, *lines]),
        "finetune": write_metrics(tmp_path / "b.jsonl", [train_line(10, 2.0), train_line(20, 1.0)]),
        "quantize": write_metrics(tmp_path / "c.jsonl", [{"kind": "eval", "samples": 10, "loss": 1}]),
        "absent": tmp_path / "nowhere.jsonl",
    }
    found = draw(tmp_path, curves)
    assert found.texts("b") == ["pretrain", "finetune"]
    first, second = found.find("svg")
    assert first["aria-label"] == "Loss of stage pretrain: 0.9 after 300 samples"
    assert second["aria-label"] == "Loss of stage finetune: 1 after 20 samples"
    kinds = [line["class"] for line in found.find("polyline")]
    assert kinds == ["noise", "noise", "noise", "raw", "main", "raw", "main"]
    points = [[tuple(map(float, p.split(","))) for p in line["points"].split()] for line in found.find("polyline")]
    assert [len(line) for line in points] == [2, 0, 2, 3, 3, 2, 2]
    assert all(
        charts._LEFT <= x <= charts._RIGHT and charts._TOP <= y <= charts._BOTTOM for line in points for x, y in line
    )
    (x0, y0), (x1, y1) = points[-1]
    assert x0 < x1 == charts._RIGHT
    assert y0 < y1  # a loss that falls goes down the page


def test_a_run_that_logs_no_moving_average_is_smoothed_here(tmp_path):
    lines = [train_line(i + 1, 2.0 + (-1) ** i) for i in range(200)]
    found = draw(tmp_path, {"stage": write_metrics(tmp_path / "m.jsonl", lines)})
    raw, main = ([float(p.split(",")[1]) for p in e["points"].split()] for e in found.find("polyline"))
    assert main[0] == raw[0]
    assert max(main[50:]) - min(main[50:]) < 0.2 * (max(raw) - min(raw))
    assert np.mean(main[50:]) == pytest.approx(np.mean(raw), abs=1)


def test_torn_and_foreign_lines_are_passed_over(tmp_path):
    path = write_metrics(tmp_path / "m.jsonl", [train_line(1), train_line(2)], torn='{"kind": "train", "samp')
    assert [p.samples for p in read_curve(path)] == [1, 2]
    with path.open("ab") as file:
        file.write(b'{"kind": "train", "samples": 3, "loss": 1}\n17\n"text"\n{"kind": "train"}\n\xff\xfe\n\n')
        file.write(json.dumps(train_line(4)).encode() + b"\n" + b'{"kind": "train", "samples": 5, "loss": 0.')
    assert [p.samples for p in read_curve(path)] == [1, 2, 4]


def test_losses_that_are_no_numbers_leave_a_gap(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "train", "samples": 1, "loss": NaN, "loss_ema": Infinity, "loss_bins": [null, NaN, 2]}\n')
    (point,) = read_curve(path)
    assert (point.loss, point.smooth, point.by_noise) == (None, None, (None, None, 2.0))


def test_a_restart_from_an_earlier_checkpoint_takes_the_place_of_what_it_repeats(tmp_path):
    first = [train_line(s, 1.0) for s in (10, 20, 30, 40)]
    again = [train_line(s, 2.0) for s in (30, 35, 50)]
    curve = read_curve(write_metrics(tmp_path / "m.jsonl", [*first, *again]))
    assert [(p.samples, p.loss) for p in curve] == [(10, 1.0), (20, 1.0), (30, 2.0), (35, 2.0), (50, 2.0)]


def test_long_runs_are_thinned_to_means(tmp_path):
    lines = [train_line(i + 1, float(i % 2), loss_bins=[i % 2 or None]) for i in range(3000)]
    curve = read_curve(write_metrics(tmp_path / "m.jsonl", lines))
    assert len(curve) == 300
    assert {p.loss for p in curve} == {0.5}
    assert {p.by_noise for p in curve} == {(1.0,)}
    assert curve[-1].samples == 3000


@pytest.mark.parametrize("losses", [(1.0, 1.0), (0.0, 0.0), (-1.0, 3.0), (1e-6, 1e6), (5.0, 0.0), (1e-9, 2e-9)])
def test_charts_of_odd_losses_have_ticks_within_the_plot(losses, tmp_path):
    curve = write_metrics(tmp_path / "m.jsonl", [train_line(i + 1, loss) for i, loss in enumerate(losses)])
    ticks = draw(tmp_path, {"stage": curve}).find("text", "y")
    assert 2 <= len(ticks) <= 14
    assert all(charts._TOP <= float(tick["y"]) <= charts._BOTTOM for tick in ticks)
    assert len({tick["text"] for tick in ticks}) == len(ticks)
