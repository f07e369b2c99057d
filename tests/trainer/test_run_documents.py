"""The documents of a run directory: what a damaged one does to a run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from models import documents
from trainer.log.metrics import Metrics, read_metrics
from trainer.log.training_log import TrainingLog
from trainer.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path, "pretrain")


def test_a_damaged_status_counts_as_none(run, caplog):
    run.write_status("done", samples=8, of=8, export="c0ffee")
    assert run.status["export"] == "c0ffee"
    path = run.path / "status.json"
    for content in ("", '{"state": "done", "samples": "8"}', "[" * 100_000):
        path.write_text(content)
        assert run.status == {}
        assert f"{path} is damaged (" in caplog.text
        assert "remove it, and run the stage again" in caplog.text
        caplog.clear()


def test_a_resumed_curve_keeps_all_lines_but_damaged_ones(run, caplog):
    lines = [{"kind": "train", "samples": n, "time": 1.0, "loss": float("nan"), "colour": "red"} for n in (8, 16, 24)]
    path = run.path / "metrics.jsonl"
    kept = [json.dumps(line) for line in lines]
    path.write_text("\n".join([kept[0], '{"kind": "train", "samples": "9"}', kept[1], kept[2], '{"kind": "tr']))
    metrics = Metrics(run, resumed_at=16, sample_rate=48_000)
    metrics.write("train", 17, loss=1.0)
    metrics.close()
    assert path.read_text().splitlines()[:2] == kept[:2]
    assert [line["samples"] for line in read_metrics(path)] == [8, 16, 17]
    assert f"2 damaged lines are passed over in {path} (line 2: `samples`: expected a whole number" in caplog.text


def test_a_curve_that_can_not_be_read_now_stays(run, monkeypatch):
    path = run.path / "metrics.jsonl"
    path.write_text('{"kind": "train", "samples": 8, "time": 1.0}\n')

    def fails(path: Path) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(documents, "opened", fails)
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        Metrics(run, resumed_at=16, sample_rate=48_000)
    assert path.read_text() == '{"kind": "train", "samples": 8, "time": 1.0}\n'


def test_a_damaged_list_of_incidents_is_kept_beside_a_new_one(run, caplog):
    log = SimpleNamespace(run=run)
    TrainingLog._incident(log, "went back", position=4)
    TrainingLog._incident(log, "went back", position=8)
    path = run.path / "incident.json"
    assert [entry["position"] for entry in json.loads(path.read_text())] == [4, 8]
    path.write_text('[{"what": "went back"')
    TrainingLog._incident(log, "went back", position=8)
    assert [entry["position"] for entry in json.loads(path.read_text())] == [8]
    assert [other.read_text() for other in run.path.glob("damaged_incident.json_*")] == ['[{"what": "went back"']
    assert "incident.json is damaged" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"), [("inputs.json", '{"latents": 1}'), ("config.yaml", "- a"), ("config.yaml", "a: [")]
)
def test_what_a_run_is_compared_by_ends_the_command(tiny, name, content):
    config = tiny()
    run = RunDirectory(Path(config.run_dir) / "pretrain", "pretrain")
    run.claim(config, {"latents": "x"})
    (run.checkpoints / "step_000000000008").mkdir(parents=True)
    run.require_same(config, {"latents": "x"})
    (run.path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.*take another run_dir=…, or remove {run.path}"):
        run.require_same(config, {"latents": "x"})
