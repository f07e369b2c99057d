"""The text file for Prometheus: its parser reads it, it is whole at all times, and it replaces no foreign file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from trainer.log.trackers import prometheus
from trainer.log.trackers.events import Points
from trainer.log.trackers.prometheus import PrometheusSink
from trainer.run_directory import RunDirectory

STRANGE = 'a "name" with \\ and\na second line'


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    (tmp_path / "run/pretrain").mkdir(parents=True)
    return RunDirectory(tmp_path / "run/pretrain", "pretrain")


def sink(run: RunDirectory, path: Path, name: str = "mine") -> PrometheusSink:
    made = PrometheusSink(path, run, name=name, planned=100)
    made.start()
    return made


def read(path: Path) -> dict[str, float]:
    """Return the samples of a file: each metric, with its term if it has one."""
    families = list(text_string_to_metric_families(path.read_text()))
    assert {family.type for family in families} == {"gauge"}
    assert all(family.documentation for family in families)
    found = {}
    for family in families:
        for sample in family.samples:
            assert set(sample.labels) - {"term"} == {"run", "stage"}
            found[sample.name.removeprefix("spresso_") + sample.labels.get("term", "")] = sample.value
    return found


def line(samples: int, **values: float) -> Points:
    return Points("train", samples, {f"train/{name}": value for name, value in values.items()})


def test_it_has_the_newest_figures(run, tmp_path):
    path = tmp_path / "mine.prom"
    (run.path / "command.txt").write_text("spresso train\nspresso train\nspresso train\n")
    checkpoint = run.checkpoints / "step_000000000008"
    checkpoint.mkdir(parents=True)
    written = sink(run, path)
    terms = {"train_terms/denoising": 1.5, "train_terms/other": 0.25}
    written.points(Points("train", 8, {"train/loss": 2.0, "train/lr": 1e-4, "train/mfu": 0.41, **terms}))
    figures = read(path)
    assert figures.pop("last_line_timestamp_seconds") == pytest.approx(checkpoint.stat().st_mtime, abs=600)
    assert figures == {
        **{"running": 1, "samples_seen": 8, "samples_planned": 100, "restarts": 2, "loss": 2.0},
        **{"learning_rate": 1e-4, "mfu_ratio": 0.41, "loss_termdenoising": 1.5, "loss_termother": 0.25},
        "last_checkpoint_timestamp_seconds": checkpoint.stat().st_mtime,
    }
    written.points(Points("held_out", 16, {"held_out/loss": 3.0}))
    written.points(line(24, loss=1.0))  # without a figure that the line before had
    written.finish()
    figures = read(path)
    assert (figures["samples_seen"], figures["loss"], figures["held_out_loss"], figures["running"]) == (24, 1.0, 3.0, 0)
    assert "mfu_ratio" not in figures
    assert "loss_termother" not in figures


def test_names_and_numbers_of_any_kind_are_valid(run, tmp_path):
    path = tmp_path / "mine.prom"
    written = sink(run, path, name=STRANGE)
    written.points(line(8, loss=math.nan, lr=math.inf, grad_norm=-math.inf, samples_per_second=7))
    figures = read(path)
    assert math.isnan(figures["loss"])
    assert (figures["learning_rate"], figures["gradient_norm"]) == (math.inf, -math.inf)
    family = next(iter(text_string_to_metric_families(path.read_text())))
    assert family.samples[0].labels["run"] == STRANGE


def test_a_file_that_no_run_wrote_stays(run, tmp_path):
    path = tmp_path / "node.prom"
    path.write_text("others 1\n")
    with pytest.raises(ValueError, match="was not written by a run: rename it"):
        sink(run, path)
    assert path.read_text() == "others 1\n"


def test_an_own_file_is_written_again(run, tmp_path):
    path = tmp_path / "mine.prom"
    sink(run, path).points(line(8, loss=1.0))
    sink(run, path).points(line(16, loss=1.0))
    assert read(path)["samples_seen"] == 16


def test_the_collector_never_sees_a_part(run, tmp_path, monkeypatch):
    """A write that fails halfway leaves the file before it, and no other file that the collector would read."""
    path = tmp_path / "mine.prom"
    written = sink(run, path)
    written.points(line(8, loss=1.0))
    before = path.read_text()
    seen = []

    def full(partial: Path, content: bytes) -> None:
        with partial.open("wb") as file:
            file.write(content[:100])
        seen.extend(tmp_path.glob("*.prom"))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        written.points(line(16, loss=1.0))
    assert seen == [path]
    assert path.read_text() == before


def test_a_start_that_was_superseded_writes_nothing(run, tmp_path):
    def require() -> None:
        raise ValueError("a later start has taken over")

    fenced = RunDirectory(run.path, "pretrain", require_ownership=require)
    with pytest.raises(ValueError, match="taken over"):
        sink(fenced, tmp_path / "mine.prom").points(line(8, loss=1.0))
    assert not (tmp_path / "mine.prom").exists()


def test_all_figures_have_names_of_their_own():
    names = [name for name, _ in prometheus._FIGURES.values()]
    assert len(set(names)) == len(names)
