"""The real packages, without a network: one curve in one run across restarts and rewinds, and nothing private."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.log.trackers import offline_wandb
from trainer.log.trackers import adapters
from trainer.log.trackers.adapters import sound_file
from trainer.log.trackers.events import HeardClip, Points, WentBack
from trainer.log.trackers.fan_out import open_trackers
from trainer.log.trackers.record import TrackerRecord
from trainer.recipes.reading import load_recipe
from trainer.run_directory import RunDirectory

ROOT = Path(__file__).parents[4]
Curve = list[tuple[int, float]]


def of_tensorboard(stage: Path) -> Curve:
    board = EventAccumulator(str(stage / "tensorboard")).Reload()
    return [(point.step, round(point.value, 3)) for point in board.Scalars("train/loss")]


def of_wandb(stage: Path) -> Curve:
    lines = [row for row in offline_wandb.rows(stage) if "train/loss" in row]
    assert [row["_step"] for row in lines] == sorted({row["_step"] for row in lines})
    return [(row["samples"], row["train/loss"]) for row in lines]


def of_mlflow(stage: Path) -> Curve:
    from mlflow import MlflowClient

    client = MlflowClient((stage.parent / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("spresso").experiment_id])
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")]


def of_trackio(stage: Path) -> Curve:
    from trackio.sqlite_storage import SQLiteStorage

    name = f"tiny.pretrain.{record_of(stage, 'trackio')['id']}"
    logs = SQLiteStorage.get_logs("spresso", name)
    return [(line["step"], line["train/loss"]) for line in logs if "train/loss" in line]


def record_of(stage: Path, name: str) -> dict:
    return json.loads((stage / f"trackers/{name}.json").read_text())


READERS: dict[str, Callable[[Path], Curve]] = {
    "tensorboard": of_tensorboard,
    "wandb": of_wandb,
    "mlflow": of_mlflow,
    "trackio": of_trackio,
}


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run/pretrain", "pretrain")


def recipe(run: RunDirectory, *overrides: str):
    return load_recipe("tiny", [f"run_dir={run.path.parent}", "data.audio=", *overrides], released=False)


def logged(run: RunDirectory, name: str, *events: Points | WentBack | HeardClip, resumed_at: int = 0, of=None) -> None:
    """Log events in one start of a run."""
    trackers = open_trackers(of or recipe(run, f"log.trackers=[{name}]"), run, resumed_at=resumed_at)
    for event in events:
        trackers.put(event)
    trackers.close(120)
    assert [tracker.left_out for tracker in trackers.backgrounds] == [0]
    if name == "wandb":  # which names its folders by the second
        (run.path / "wandb").rename(run.path / f"wandb-{len(list(run.path.glob('wandb-*')))}")


def lines(*at: int, loss: float) -> list[Points]:
    return [Points("train", samples, {"train/loss": loss, "train/lr": 0.1}) for samples in at]


@pytest.mark.parametrize("name", READERS)
def test_a_resumed_and_rewound_run_is_one_curve(name, run):
    logged(run, name, *lines(8, 16, 24, loss=1.0))
    # killed after the line at 24 samples, and resumed from a checkpoint at 8; then rewound from 40 to 16
    again = [*lines(16, 24, 32, 40, loss=2.0), WentBack(16), *lines(24, 32, 40, 48, loss=3.0)]
    logged(run, name, *again, resumed_at=8)
    kept_first = [(8, 1.0), (16, 1.0), (24, 1.0), (32, 2.0), (40, 2.0), (48, 3.0)]
    replaced = [(8, 1.0), (16, 2.0), (24, 3.0), (32, 3.0), (40, 3.0), (48, 3.0)]
    assert READERS[name](run.path) == (replaced if name == "tensorboard" else kept_first)


def test_offline_runs_of_wandb_have_one_id_and_rows_that_go_on(run):
    logged(run, "wandb", *lines(8, loss=1.0))
    logged(run, "wandb", *lines(16, loss=1.0), resumed_at=8)
    assert offline_wandb.run_ids(run.path) == {record_of(run.path, "wandb")["id"]}
    assert [row["_step"] for row in offline_wandb.rows(run.path)] == [0, 1]


def heard(run: RunDirectory) -> HeardClip:
    path = sound_file(run, "clip_3/decoded", 16)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"fLaC, as far as MLflow is concerned")
    return HeardClip("clip_3/decoded", 16, np.zeros(4800, np.float32), 48_000, np.zeros((8, 16, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("wandb", {".wav", ".png"}),
        ("mlflow", {".flac", ".png"}),
        ("trackio", {".wav", ".png"}),
    ],
)
def test_sounds_and_spectrograms_arrive_once(name, kinds, run):
    clip = heard(run)
    logged(run, name, clip, clip)
    logged(run, name, clip)
    folder = Path(os.environ["TRACKIO_DIR"]) if name == "trackio" else run.path.parent
    ours = record_of(run.path, "trackio")["id"] if name == "trackio" else name
    found = [path.suffix for path in folder.rglob("*") if ours in str(path.relative_to(folder))]
    assert {suffix: found.count(suffix) for suffix in kinds} == dict.fromkeys(kinds, 1)


def test_tensorboard_plays_sounds_and_shows_the_settings(run):
    logged(run, "tensorboard", heard(run))
    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    tags = board.Tags()
    assert (tags["images"], tags["audio"]) == (["clip_3/decoded"], ["clip_3/decoded"])
    text = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    name: tiny\n" in text


@pytest.mark.parametrize("name", READERS)
def test_nothing_private_arrives(name, run, monkeypatch):
    monkeypatch.setenv("OF_MINE", "hunter2")
    monkeypatch.setenv("WANDB_API_KEY", "hunter2" * 6)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["spresso", "log.notify=https://hooks.example/hunter2"])
    secrets = ("log.notify=https://hooks.example/hunter2", "data.latents=https://me:hunter2@host/set?key=hunter2")
    config = recipe(run, f"log.trackers=[{name}]", "cluster.environment={TOKEN: hunter2}", *secrets)
    logged(run, name, *lines(8, loss=1.0), of=config)
    folders = [run.path.parent, *([Path(os.environ["TRACKIO_DIR"])] if name == "trackio" else [])]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []
    assert any(b"lr" in path.read_bytes() for path in files)
    if name == "wandb":
        shown = offline_wandb.configs(run.path)
        assert "hunter2" not in shown
        assert "autoencode.lr" in shown


def test_a_store_of_mlflow_that_lost_the_run_gets_another(run):
    logged(run, "mlflow", *lines(8, 16, loss=1.0))
    first = record_of(run.path, "mlflow")["id"]
    shutil.rmtree(next((run.path.parent / "mlflow").glob(f"*/{first}")))
    logged(run, "mlflow", *lines(16, 24, loss=2.0), resumed_at=8)
    assert record_of(run.path, "mlflow")["id"] != first
    assert of_mlflow(run.path) == [(16, 2.0), (24, 2.0)]


def test_a_server_of_mlflow_that_is_away_holds_nobody_up(run, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    trackers = open_trackers(recipe(run, "log.trackers=[mlflow]"), run, resumed_at=0)
    trackers.put(lines(8, loss=1.0)[0])
    trackers.close(120)
    assert trackers.backgrounds[0].left_out == 1
    assert "the tracker mlflow does not start" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_server_of_wandb_that_is_away_leaves_files_to_upload(run, monkeypatch, capfd):
    monkeypatch.setattr(adapters, "_PATIENCE", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", "hunter2" * 6)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    logged(run, "wandb", *lines(8, 16, loss=1.0))
    assert of_wandb(run.path) == [(8, 1.0), (16, 1.0)]
    assert "hunter2" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("content", ["", '{"id": 7}', '{"id": "a", "rows": -1, "until": {}}'])
def test_a_damaged_record_begins_another_run(content, run, caplog):
    path = run.path / "trackers/wandb.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    record = TrackerRecord(run, "wandb")
    assert record.fresh
    assert f"{path} is damaged" in caplog.text
    assert TrackerRecord(run, "wandb").id != record.name_it()
    assert TrackerRecord(run, "wandb").id == record.id


def test_a_start_that_was_superseded_keeps_no_record(run):
    def require() -> None:
        raise ValueError("a later start has taken over")

    fenced = RunDirectory(run.path, "pretrain", require_ownership=require)
    with pytest.raises(ValueError, match="taken over"):
        TrackerRecord(fenced, "wandb").name_it()
    assert not (run.path / "trackers").exists()


KILLED = """
import json, os, sys, time
from pathlib import Path
import psutil
from accelerate.state import PartialState
from trainer.log.trackers.events import Points
from trainer.log.trackers.fan_out import open_trackers
from trainer.recipes.reading import load_recipe
from trainer.run_directory import RunDirectory

PartialState()
folder = Path(sys.argv[1])
config = load_recipe("tiny", [f"run_dir={folder}", "data.audio=", "log.trackers=[wandb]"], released=False)
trackers = open_trackers(config, RunDirectory(folder / "pretrain", "pretrain"), resumed_at=0)
trackers.put(Points("train", 8, {"train/loss": 1.0}))
record, until = folder / "pretrain/trackers/wandb.json", time.monotonic() + 60
while not (record.exists() and json.loads(record.read_text())["rows"]) and time.monotonic() < until:
    time.sleep(0.01)
(core,) = [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]
core.kill()
core.wait()
for samples in range(16, 64, 8):
    trackers.put(Points("train", samples, {"train/loss": 1.0}))
trackers.close(1)
print("went on")
sys.stdout.flush()
os._exit(0)
"""


def test_a_tracker_whose_process_is_killed_ends_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("WANDB_SERVICE", None)  # the process that this process has for its own runs
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def test_trackers_write_nothing_to_standard_output(run, capsys):
    for name in READERS:
        logged(run, name, *lines(8, loss=1.0))
    assert capsys.readouterr().out == ""
