"""Trackers of whole trainings: they change no number, hold no step up, and see one curve of rank 0 alone."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from tests.trainer import rank_processes
from tests.trainer.log.trackers.test_adapters import of_mlflow, of_tensorboard
from trainer.log.metrics import read_metrics
from trainer.log.trackers import background, fan_out
from trainer.loop import train

PRETRAIN = ("pretrain.samples=64", "log.every=8", "log.samples_every=32", "checkpoint.every=32")


def losses(stage: Path) -> list[tuple[int, float]]:
    lines = read_metrics(stage / "metrics.jsonl")
    return [(line["samples"], line["loss"]) for line in lines if line["kind"] == "train"]


class Stuck:
    """A tracker that hangs until it is released."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def start(self) -> None:
        self.release.wait()
        raise RuntimeError("the test is over")

    points = clip = go_back = finish = start


def test_a_tracker_that_hangs_changes_no_number_and_no_end(tiny, tmp_path, monkeypatch):
    config = tiny(*PRETRAIN, "log.trackers=[]", run_dir=tmp_path / "untracked")
    assert train(config, "pretrain") == "done"
    assert not (tmp_path / "untracked/pretrain/tensorboard").exists()
    stuck = Stuck()
    monkeypatch.setattr(background, "_abandoned", [])
    monkeypatch.setattr(background, "MOST_EVENTS", 3)
    monkeypatch.setattr(fan_out, "_sinks", lambda *arguments: [("stuck", stuck)])
    monkeypatch.setattr(fan_out.Trackers.close, "__defaults__", (0.0,))
    assert train(tiny(*PRETRAIN), "pretrain") == "done"
    stuck.release.set()
    assert losses(tmp_path / "run/pretrain") == losses(tmp_path / "untracked/pretrain")
    said = (tmp_path / "run/pretrain/logs/rank_0.log").read_text()
    assert said.count("the tracker stuck is too far behind") == 1
    assert "the tracker stuck does not end, and is left behind" in said


def test_a_tensorboard_that_can_not_be_written_ends_no_training(tiny, tmp_path):
    stage = tmp_path / "run/pretrain"
    stage.mkdir(parents=True)
    (stage / "tensorboard").write_text("no folder")
    assert train(tiny(*PRETRAIN), "pretrain") == "done"
    assert (stage / "logs/rank_0.log").read_text().count("the tracker tensorboard does not start") == 1
    assert (stage / "tensorboard").read_text() == "no folder"
    assert len(losses(stage)) == 8


def test_a_run_that_is_killed_and_resumed_goes_on_in_its_tracker_run(tiny, tmp_path):
    stage, trackers = tmp_path / "run/pretrain", "log.trackers=[tensorboard,mlflow]"
    assert train(tiny(*PRETRAIN, trackers), "pretrain") == "done"
    first = losses(stage)
    shutil.rmtree(stage / "checkpoints/step_000000000064")
    assert train(tiny(*PRETRAIN, trackers, "pretrain.samples=96", "log.every=16"), "pretrain") == "done"
    curve = losses(stage)
    assert [samples for samples, _ in curve] == [8, 16, 24, 32, 48, 64, 80, 96]
    assert of_tensorboard(stage) == [(samples, pytest.approx(loss, abs=2e-3)) for samples, loss in curve]
    assert of_mlflow(stage) == first + curve[-2:]  # what was done again is not sent a second time


def _train(rank: int, config) -> None:
    train(config, "pretrain")


def test_rank_0_alone_has_trackers(tiny, tmp_path):
    config = tiny(*PRETRAIN, "log.trackers=[tensorboard,mlflow]", f"log.prometheus={tmp_path}/run.prom")
    assert rank_processes.run(_train, 2, config) == [0, 0]
    stage = tmp_path / "run/pretrain"
    assert len(list((stage / "tensorboard").glob("events*"))) == 1
    assert of_mlflow(stage) == losses(stage)
    assert 'spresso_samples_seen{run="tiny",stage="pretrain"} 64\n' in (tmp_path / "run.prom").read_text()
