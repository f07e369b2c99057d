"""The chart of what a bit is worth."""

from __future__ import annotations

import copy

import pytest

from tests.trainer.page.test_page import Page
from trainer.page.bit_chart import bits_section

CURVE = {
    "z_rank": 9, "channels": 64, "clips": 10, "identity": "x",
    "points": [
        {"books": 1, "bits": 8, "kbps": 0.0889, "mean": 7.0, "ci": [6.0, 8.0], "clips": [7.0], "control": 12.0},
        {"books": 2, "bits": 16, "kbps": 0.1778, "mean": 6.0, "ci": None, "clips": [6.0]},
        {"books": 4, "bits": 32, "kbps": 0.3556, "mean": 5.0, "ci": [4.5, 5.5], "clips": [5.0], "control": 12.5},
    ],
    "lines": {
        "z": {"mean": 4.5, "ci": [4.0, 5.0], "clips": [4.5]},
        "autoencoder": {"mean": 0.5, "ci": [0.4, 0.6], "clips": [0.5]},
        "z_other": {"mean": 13.0, "ci": [12.0, 14.0], "clips": [13.0]},
    },
}  # fmt: skip


def drawn(tmp_path, curve: dict | None) -> Page:
    index = tmp_path / "index.html"
    index.write_text(bits_section({"curve": curve}) or "")
    return Page(index)


def test_each_point_is_where_its_bits_and_decibels_are(tmp_path):
    page = drawn(tmp_path, CURVE)
    x, y = ([float(circle[name]) for circle in page.find("circle")] for name in ("cx", "cy"))
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(8 / 24, abs=0.01)
    assert (y[1] - y[0]) / (y[2] - y[0]) == pytest.approx(0.5, abs=0.01)
    assert y == sorted(y)  # lower is better, and drawn lower
    assert len(page.find("line", "interval")) == 2
    heights = [float(line["y1"]) for line in page.find("line", "level")]
    assert heights == sorted(heights, reverse=True)
    assert [*page.texts("text", "name left"), *page.texts("text", "name")] == ["AudioAE alone", "continuous z"]


def test_the_control_does_not_flatten_the_curve(tmp_path):
    """Another clip's z stands in words and in the table: the points span much of the chart."""
    page = drawn(tmp_path, CURVE)
    y = [float(circle["cy"]) for circle in page.find("circle")]
    assert max(y) - min(y) > 0.15 * 280
    assert "another clip's z gives 13.0 dB" in page.texts("p", "legend")[0]


def test_the_words_say_what_is_drawn(tmp_path):
    page = drawn(tmp_path, CURVE)
    assert "9 directions of its 64 channels" in page.texts("p", "lead")[0]
    assert page.find("svg")[0]["aria-label"] == "Log-mel distance: 7.00 dB at 8 bits, 5.00 dB at 32"
    assert page.texts("td")[:5] == ["8", "0.089", "7.00", "6.00 to 8.00", "12.00"]


def test_a_single_point_and_no_curve(tmp_path):
    one = copy.deepcopy(CURVE)
    one["points"] = one["points"][1:2]
    page = drawn(tmp_path, one)
    assert len(page.find("circle")) == 1
    assert bits_section({"curve": None}) is None
    assert bits_section({}) is None
