"""Following a metrics.jsonl: each line is read once, whatever a training, a disk or an editor does to the file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from launch.dashboard import metrics_file
from launch.dashboard.curve_store import CurveStore
from launch.dashboard.metrics_file import MetricsFile, Table, thinned


def line(samples: int, loss: float = 1.0, kind: str = "train", **values: object) -> bytes:
    return (
        json.dumps({"kind": kind, "samples": samples, "time": 1e9 + samples, "loss": loss, **values}).encode() + b"\n"
    )


def losses(file: MetricsFile) -> dict[int, float]:
    table = file.tables.get("train")
    return {} if table is None else dict(zip(table.samples, table.curves["train/loss"], strict=True))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Samples of the lines that were parsed."""
    seen = []
    real = metrics_file.parse_line

    def parsed(content: bytes, path: Path) -> object:
        found = real(content, path)
        seen.append(found["samples"])
        return found

    monkeypatch.setattr(metrics_file, "parse_line", parsed)
    return seen


def test_a_file_that_is_not_there_yet(path):
    file = MetricsFile(path)
    assert file.refresh()
    assert (file.tables, file.problem) == ({}, "")
    path.write_bytes(line(8))
    file.refresh()
    assert losses(file) == {8: 1.0}


def test_only_new_lines_are_read(path, reads):
    path.write_bytes(line(8) + line(16))
    file = MetricsFile(path)
    file.refresh()
    with path.open("ab") as appended:
        appended.write(line(24, 2.0))
    file.refresh()
    file.refresh()
    assert losses(file) == {8: 1.0, 16: 1.0, 24: 2.0}
    assert reads == [8, 16, 24]


def test_an_incomplete_last_line_waits_for_its_end(path):
    whole = line(16, 3.0)
    for cut in range(len(whole)):
        path.write_bytes(line(8) + whole[:cut])
        file = MetricsFile(path)
        file.refresh()
        assert losses(file) == {8: 1.0}, cut
        with path.open("ab") as appended:
            appended.write(whole[cut:])
        file.refresh()
        assert losses(file) == {8: 1.0, 16: 3.0}, cut
        assert file.damaged == 0


@pytest.mark.parametrize("kept", [0, 1, 7, 49, 50])
@pytest.mark.parametrize("appended", [0, 3, 80])
def test_a_rewound_training_replaces_the_file(path, reads, kept, appended):
    before = [line(8 * n, float(n)) for n in range(1, 51)]
    path.write_bytes(b"".join(before))
    file = MetricsFile(path)
    file.refresh()
    generation = file.generation
    reads.clear()
    later = [line(8 * n, n + 0.5) for n in range(kept + 1, kept + 1 + appended)]
    (path.parent / "partial").write_bytes(b"".join([*before[:kept], *later]))
    (path.parent / "partial").replace(path)
    file.refresh()
    assert list(losses(file).values()) == [float(n) for n in range(1, kept + 1)] + [
        n + 0.5 for n in range(kept + 1, kept + 1 + appended)
    ]
    assert reads == [8 * n for n in range(kept + 1, kept + 1 + appended)]  # nothing is read twice
    assert (file.generation != generation) == (kept < 50)


def test_a_file_that_is_written_over_in_place(path):
    path.write_bytes(b"".join(line(8 * n) for n in range(1, 20)))
    file = MetricsFile(path)
    file.refresh()
    with path.open("rb+") as other:
        other.write(b"".join(line(8 * n, 5.0) for n in range(1, 30)))
    file.refresh()
    assert losses(file) == {8 * n: 5.0 for n in range(1, 30)}


def test_a_truncated_and_a_removed_file(path):
    path.write_bytes(line(8) + line(16) + line(24))
    file = MetricsFile(path)
    file.refresh()
    os.truncate(path, len(line(8)) + 5)
    file.refresh()
    assert losses(file) == {8: 1.0}
    path.unlink()
    file.refresh()
    assert (losses(file), file.at) == ({}, 0)


@pytest.mark.parametrize(
    "damage",
    [
        b"{\n", b"\xff\xfe\n", b"[]\n", b'{"kind": "train"}\n', b'{"kind": "train", "samples": -1}\n',
        b'{"kind": "train", "samples": 1e400}\n', b"[" * 100_000 + b"\n", b"x" * (3 << 20) + b"\n",
        b'{"kind": 7, "samples": 8}\n', b'{"kind": "train", "samples": 9, "time": "now"}\n',
    ],
)  # fmt: skip
def test_damaged_lines_are_passed_over_and_counted(path, damage):
    path.write_bytes(line(8) + damage + line(16) + damage[:-1])
    file = MetricsFile(path)
    file.refresh()
    assert losses(file) == {8: 1.0, 16: 1.0}
    assert file.damaged == 1
    with path.open("ab") as appended:  # the training begins a line of its own after a torn one
        appended.write(b"\n\n" + line(24))
    file.refresh()
    assert losses(file) == {8: 1.0, 16: 1.0, 24: 1.0}
    assert file.damaged == 2


def test_values_that_are_no_numbers_leave_gaps(path):
    path.write_bytes(
        line(8, mfu=0.4, loss_terms={"a": 1.0, "b": None}, loss_bins=[1.0, None])
        + line(16, math.nan, loss_bins=None, slow=True, text="x", loss_terms={"a": "x"})
        + line(24, 1e300)
        + line(32, 2.0, loss_bins=[3.0, 4.0])
    )
    file = MetricsFile(path)
    file.refresh()
    found = {
        name: [None if math.isnan(v) else v for v in column] for name, column in file.tables["train"].curves.items()
    }
    assert found == {
        "train/loss": [1.0, None, None, 2.0],
        "train/mfu": [pytest.approx(0.4), None, None, None],
        "train_terms/a": [1.0, None, None, None],
        "train_by_noise_level/0": [1.0, None, None, 3.0],
        "train_by_noise_level/1": [None, None, None, 4.0],
    }


def test_a_path_that_is_no_file(path):
    os.mkfifo(path)
    file = MetricsFile(path)
    assert file.refresh()
    assert "a pipe" in file.problem or "named pipe" in file.problem


def test_a_long_file_is_read_in_pieces(path):
    path.write_bytes(b"".join(line(8 * n, n / 7) for n in range(1, 100_001)))
    file = MetricsFile(path)
    steps = [file.at]
    while not file.refresh(seconds=0.0):
        steps.append(file.at)
    assert len(steps) > 5
    assert steps == sorted(set(steps))
    assert np.allclose(list(losses(file).values()), np.arange(1, 100_001) / 7)
    assert file.nbytes < 100_000 * 60


def test_more_lines_than_are_kept_keep_their_peaks(path, monkeypatch):
    monkeypatch.setattr(metrics_file, "MOST_ROWS", 64)
    peaks = {40: 900.0, 333: -900.0}
    path.write_bytes(b"".join(line(n, peaks.get(n, float(n))) for n in range(1, 401)))
    file = MetricsFile(path)
    file.refresh()
    table = file.tables["train"]
    assert len(table.samples) < 64
    assert table.stride > 1
    assert list(table.samples) == sorted(set(table.samples))
    assert np.diff(table.samples).max() <= 2 * table.stride  # the whole length is covered
    assert {900.0, -900.0} <= set(table.curves["train/loss"])
    path.write_bytes(b"".join(line(n) for n in range(1, 31)))
    file.refresh()
    assert losses(file) == dict.fromkeys(range(1, 31), 1.0)


@pytest.mark.parametrize("points", [0, 1, 2, 199, 200, 201, 12_345, 1_000_000])
def test_thinned_curves_keep_ends_and_peaks(points):
    x, y = np.arange(points, dtype=np.float64), np.sin(np.arange(points, dtype=np.float32) / 50)
    if points > 300:
        y[points // 3], y[points // 2] = 50, -50
    thin_x, thin_y = thinned(x, y, width=100)
    assert len(thin_x) <= 2 * 100 + 4
    assert (np.diff(thin_x) > 0).all()
    if points:
        assert (thin_x[0], thin_x[-1], thin_y.min(), thin_y.max()) == (0, points - 1, y.min(), y.max())
        assert (y[thin_x.astype(int)] == thin_y).all()


def test_an_answer_holds_what_the_page_lacks(path):
    path.write_bytes(b"".join(line(8 * n, float(n)) for n in range(1, 11)))
    store = CurveStore()
    first = store.answer(path)
    assert first["whole"]
    assert first["kinds"]["train"]["train/loss"]["x"] == [8 * n for n in range(1, 11)]
    same = store.answer(path, since=first["token"])
    assert (same["whole"], same["kinds"]) == (False, {"train": {}})
    with path.open("ab") as appended:
        appended.write(line(88, 11.0) + line(88, 9.0, kind="held_out", z_rank=3))
    more = store.answer(path, since=first["token"])
    assert not more["whole"]
    assert more["kinds"]["train"]["train/loss"] == {"x": [88], "y": [11.0]}
    assert more["kinds"]["held_out"]["held_out/z_rank"] == {"x": [88], "y": [3.0]}
    path.write_bytes(line(8, 1.0) + line(16, 7.0))
    again = store.answer(path, since=more["token"])
    assert again["whole"]
    assert again["kinds"]["train"]["train/loss"] == {"x": [8, 16], "y": [1.0, 7.0]}


@pytest.mark.parametrize("since", ["", "x", "1.1:train=99", "::", "1.1:train=-4", "\x00", "9" * 5000])
def test_a_token_of_another_file_gets_everything(path, since):
    path.write_bytes(line(8))
    answer = CurveStore().answer(path, since=since)
    assert answer["whole"]
    assert answer["kinds"]["train"]["train/loss"]["x"] == [8]


def test_a_zoom_shows_every_point_within_it(path):
    path.write_bytes(b"".join(line(n, float(n)) for n in range(1, 5001)))
    store = CurveStore()
    whole = store.answer(path, width=50)["kinds"]["train"]["train/loss"]
    assert len(whole["x"]) <= 104
    zoomed = store.answer(path, width=50, low=1000, high=1060)["kinds"]["train"]["train/loss"]
    assert zoomed["x"] == list(range(999, 1062))
    assert store.answer(path, low=9000, high=9001)["kinds"]["train"]["train/loss"]["x"] == [5000]


def test_gaps_in_time_are_told(path):
    times = [10.0 * n + (7200 if n > 30 else 0) for n in range(60)]
    rows = [{"kind": "train", "samples": 8 * n, "time": 1e9 + time, "loss": 1} for n, time in enumerate(times)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert CurveStore().answer(path)["gaps"] == [{"samples": 240, "seconds": 7210.0}]


def test_files_beyond_the_bound_of_memory_are_read_again(tmp_path):
    paths = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for number, each in enumerate(paths):
        each.write_bytes(b"".join(line(8 * n, float(number)) for n in range(1, 101)))
    store = CurveStore(most_bytes=1)
    tokens = [store.answer(each)["token"] for each in paths]
    assert len(store._files) == 1
    again = store.answer(paths[0], since=tokens[0])
    assert again["whole"]
    assert again["kinds"]["train"]["train/loss"]["y"] == [0.0] * 100


def test_the_bound_of_memory_is_reckoned_while_another_answer_reads(path):
    """A kind of lines that is found meanwhile would break off the sum over the tables."""
    file = MetricsFile(path)

    class Growing(Table):
        @property
        def curves(self):
            file.tables.setdefault("held_out", Table())
            return {}

        @curves.setter
        def curves(self, value):
            pass

    file.tables = {"train": Growing(), "eval": Growing()}
    assert file.nbytes >= 0
    assert "held_out" in file.tables
