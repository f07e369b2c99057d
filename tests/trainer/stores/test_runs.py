"""Runs with a store: an empty disk goes on to the bit, kills, other ranks, stores that hang, two runs at one place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch import pipeline
from launch.cli import main
from launch.status import upload as upload_status
from tests.stores import SECRET, SHORT
from tests.trainer import rank_processes
from tests.trainer.checkpoints.test_checkpoint import flip_a_byte
from tests.trainer.log.trackers.test_adapters import of_mlflow
from trainer.checkpoints.names import checkpoints, samples_of
from trainer.loop import train
from trainer.recipes.reading import load_recipe
from trainer.stop import Stop
from trainer.stores import uploads
from trainer.stores.fetch import fetch
from trainer.stores.layout import located
from trainer.stores.store import Store


class Asked(Stop):
    """Asks to leave at a number of samples; `late`: with no time left then."""

    def __init__(self, at: int, *, late: bool = False) -> None:
        self.at, self.late, self.now = at, late, False

    def __call__(self) -> bool:
        return self.now

    def before_step(self, samples: int) -> None:
        self.now = self.now or samples >= self.at

    def has_less_than(self, seconds: float) -> bool:
        return self.late and self.now and seconds < 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prepared) -> Path:
    """The run directory of a run that nobody interrupted."""
    run_dir = tmp_path_factory.mktemp("whole")
    paths = [f"run_dir={run_dir}", f"data.latents={prepared / 'latents'}", f"data.audio={prepared / 'audio'}"]
    config = load_recipe("tiny", [*paths, "parallel.threads=1", "parallel.device=cpu", *SHORT])
    assert train(config, "pretrain") == "done"
    return run_dir


def require_same_end(one: Path, other: Path) -> None:
    """Assert that two runs ended in the same weights, moments and curve."""
    ends = [checkpoints(run / "pretrain" / "checkpoints")[-1] for run in (one, other)]
    ours, theirs = (load_file(path / "rank_00000.safetensors") for path in ends)
    assert [samples_of(path) for path in ends] == [96, 96]
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert losses(one) == losses(other)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run_dir / "pretrain" / "metrics.jsonl").read_text().splitlines())
    return [(line["samples"], line["loss"]) for line in lines if line["kind"] == "train"]


def stopped_at(config, samples: int) -> None:
    fetch(config, "pretrain")
    assert train(config, "pretrain", stop=Asked(samples)) == "stopped"


def test_a_fresh_node_goes_on_to_the_bit(place, on, tmp_path, whole, files_of):
    stopped_at(on(place, "first"), 48)
    shutil.rmtree(tmp_path / "first")
    assert pipeline.train(on(place, "second"), "pretrain") == "done"
    require_same_end(tmp_path / "second", whole)
    there = files_of(place)
    assert {"pretrain/done.json", "pretrain/metrics.jsonl", "pretrain/export/dit.safetensors"} <= there.keys()
    assert {name.split("/")[2] for name in there if "/checkpoints/" in name} >= {"step_000000000096"}
    # And a third node has nothing left to do.
    assert pipeline.train(on(place, "third"), "pretrain") == "done"
    export = "pretrain/export/dit.safetensors"
    assert (tmp_path / "third" / export).read_bytes() == (tmp_path / "second" / export).read_bytes()


def test_a_fresh_node_goes_on_in_the_same_run_of_a_tracker(disk, on, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server/mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    stopped_at(on(disk, "first", "log.trackers=[mlflow]"), 48)
    shutil.rmtree(tmp_path / "first")
    assert pipeline.train(on(disk, "second", "log.trackers=[mlflow]"), "pretrain") == "done"
    assert of_mlflow(tmp_path / "server/run") == losses(tmp_path / "second")


def test_a_disk_that_was_left_behind_takes_what_is_newer(s3, on, tmp_path, whole):
    stopped_at(on(s3, "first"), 32)
    stopped_at(on(s3, "second"), 64)
    assert pipeline.train(on(s3, "first"), "pretrain") == "done"
    require_same_end(tmp_path / "first", whole)


def test_another_number_of_ranks_goes_on(disk, on, tmp_path, whole):
    stopped_at(on(disk, "first"), 48)
    config = on(disk, "second", "parallel.processes=2")
    fetch(config, "pretrain")
    assert rank_processes.run(_train_rank, 2, config, seconds=100) == [0, 0]
    assert dict(losses(tmp_path / "second")) == pytest.approx(dict(losses(whole)), rel=1e-5)


def _train_rank(rank: int, config: Any) -> None:
    assert train(config, "pretrain") == "done"


def test_killed_in_the_middle_of_an_upload(s3, on, tmp_path, whole):
    config = on(s3, "first")
    stopped_at(config, 24)
    known = checkpoints(tmp_path / "first/pretrain/checkpoints")[-1].name
    s3.proxy.fault = lambda method, name: "gate" if method == "PUT" and "rank_" in name and known not in name else ""
    program = [sys.executable, "-m", "launch.cli", "train", "tiny", "stage=pretrain", *SHORT, "parallel.threads=1"]
    settings = [f"run_dir={config.run_dir}", f"data.latents={config.data.latents}", f"data.audio={config.data.audio}"]
    process = subprocess.Popen(
        [*program, *settings, "parallel.device=cpu", f"checkpoint.upload={s3.url}"],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    assert s3.proxy.at_gate.wait(100)
    process.send_signal(signal.SIGKILL)
    process.wait()
    s3.proxy.fault = lambda method, name: ""
    shutil.rmtree(config.run_dir)
    assert pipeline.train(on(s3, "second"), "pretrain") == "done"
    assert "resumed from" in (tmp_path / "second/pretrain/logs/rank_0.log").read_text()
    require_same_end(tmp_path / "second", whole)


def test_a_store_that_hangs_holds_no_step_up_and_keeps_few_checkpoints(s3, on, tmp_path, whole):
    s3.proxy.fault = lambda method, name: "gate" if "rank_" in name else ""
    config, directory = on(s3, "run", "checkpoint.keep_last=1", "checkpoint.every=8"), tmp_path / "run" / "pretrain"
    most = 0

    class Counting(Asked):
        def before_step(self, samples: int) -> None:
            nonlocal most
            super().before_step(samples)
            assert samples < 80 or s3.proxy.at_gate.wait(60)  # by then the store has been asked, and hangs
            most = max(most, len(checkpoints(directory / "checkpoints")))

    assert train(config, "pretrain", stop=Counting(88, late=True)) == "stopped"
    assert [samples for samples, _ in losses(tmp_path / "run")] == [*range(8, 97, 8)]
    assert most <= 3  # the one that is being uploaded, the newest, and the one before it until the next save
    assert "is on its way" in upload_status.remark(directory, runs=True)
    s3.proxy.gate.set()
    s3.proxy.fault = lambda method, name: ""
    assert pipeline.train(on(s3, "run", "checkpoint.keep_last=1"), "pretrain") == "done"
    require_same_end(tmp_path / "run", whole)


def test_a_store_that_is_away_is_waited_for_no_longer_than_it_is_worth(s3, on, tmp_path, whole, monkeypatch, capfd):
    """The end of the run is not lost: the same command uploads what is missing."""
    monkeypatch.setattr(uploads, "_NO_MOVE", 0.5)
    s3.proxy.fault = lambda method, name: "503" if method == "PUT" else ""
    config = on(s3, "run")
    assert pipeline.train(config, "pretrain") == "done"
    require_same_end(tmp_path / "run", whole)
    assert "repeat the command to upload the rest" in (tmp_path / "run/pretrain/logs/rank_0.log").read_text()
    s3.proxy.fault = lambda method, name: ""
    monkeypatch.setattr(uploads, "_NO_MOVE", 60.0)
    assert pipeline.train(config, "pretrain") == "done"
    assert s3.proxy.asked(r"PUT .*/done\.json")
    before = len(s3.proxy.asked("PUT"))
    assert pipeline.train(config, "pretrain") == "done"
    assert len(s3.proxy.asked("PUT")) == before  # it is there
    assert "export is whole there" in upload_status.remark(tmp_path / "run" / "pretrain", runs=False)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(disk, on, tmp_path, whole, caplog):
    stopped_at(on(disk, "first"), 64)
    names = Store(disk.url, patience=0).sizes("pretrain/checkpoints")
    (tmp_path / "disk/pretrain/checkpoints" / max(names) / "rank_00000.safetensors").write_bytes(b"torn")
    fetch(on(disk, "second"), "pretrain")
    assert f"DAMAGED CHECKPOINT {disk.url}/pretrain/{max(names)} is passed over" in caplog.text
    assert [path.name for path in checkpoints(tmp_path / "second/pretrain/checkpoints")] == [min(names)]
    for name in names:
        (tmp_path / "disk/pretrain/checkpoints" / name / "rank_00000.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="holds no whole checkpoint, 2 damaged: begin anew with another"):
        fetch(on(disk, "third"), "pretrain")


def test_a_checkpoint_that_is_damaged_on_the_disk_alone_is_fetched(disk, on, tmp_path, whole):
    """Its size is right, such as after a power failure; the store has it whole."""
    stopped_at(on(disk, "run"), 64)
    newest = checkpoints(tmp_path / "run/pretrain/checkpoints")[-1]
    flip_a_byte(newest / "rank_00000.safetensors", 1000)
    assert pipeline.train(on(disk, "run"), "pretrain") == "done"
    assert f"resumed from {newest} at {samples_of(newest)}" in (tmp_path / "run/pretrain/logs/rank_0.log").read_text()
    require_same_end(tmp_path / "run", whole)
    assert (tmp_path / "disk/pretrain/done.json").exists()


def test_a_run_that_passed_a_damaged_checkpoint_over_is_uploaded(disk, on, tmp_path, whole):
    stopped_at(on(disk, "first"), 64)
    newest = max(Store(disk.url, patience=0).sizes("pretrain/checkpoints"))
    (tmp_path / "disk/pretrain/checkpoints" / newest / "rank_00000.safetensors").write_bytes(b"torn")
    assert pipeline.train(on(disk, "second"), "pretrain") == "done"
    require_same_end(tmp_path / "second", whole)
    assert (tmp_path / "disk/pretrain/done.json").exists()
    fetch(on(disk, "third"), "pretrain")
    assert (tmp_path / "third/pretrain/export").is_dir()


def test_a_start_without_an_answer_begins_nothing_anew(s3, on, tmp_path):
    s3.proxy.fault = lambda method, name: "500"
    config = on(s3, "run", "data.cache.patience=0.1")
    with pytest.raises(ValueError, match=r"holds a checkpoint of this run is unknown: repeat the command, or remove"):
        pipeline.train(config, "pretrain")
    assert not checkpoints(tmp_path / "run/pretrain/checkpoints")


def test_a_bucket_that_is_missing_is_no_empty_store(s3, on, tmp_path):
    config = on(s3, "run")
    config.checkpoint.upload = "s3://buckte/run"
    with pytest.raises(ValueError, match=r"^s3://buckte/run: there is no such bucket.*: check its name; whether"):
        fetch(config, "pretrain")
    fetch(on(s3, "run"), "pretrain")


def test_a_run_with_checkpoints_of_its_own_goes_on_without_the_store(s3, on, tmp_path, whole, monkeypatch, caplog):
    stopped_at(on(s3, "run"), 48)
    s3.proxy.fault = lambda method, name: "403"
    monkeypatch.setattr(uploads, "_NO_MOVE", 0.1)
    assert pipeline.train(on(s3, "run"), "pretrain") == "done"
    require_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("other", ["seed=7", "pretrain.lr=0.5"])
def test_a_run_with_other_settings_is_refused(disk, on, tmp_path, other, files_of):
    stopped_at(on(disk, "first"), 32)
    before = files_of(disk)
    with pytest.raises(ValueError, match=r"holds another run \(the run tiny, .*give another checkpoint.upload"):
        pipeline.train(on(disk, "second", other), "pretrain")
    assert files_of(disk) == before
    assert not checkpoints(tmp_path / "second/pretrain/checkpoints")


def test_a_run_that_began_elsewhere_is_refused(disk, on, tiny, tmp_path):
    stopped_at(on(disk, "first"), 32)
    config = tiny(*SHORT, run_dir=tmp_path / "second")
    assert train(config, "pretrain", stop=Asked(32)) == "stopped"
    with pytest.raises(ValueError, match="holds another run"):
        pipeline.train(on(disk, "second"), "pretrain")


@pytest.mark.parametrize("choice", ["never", "PATH"])
def test_a_start_that_would_leave_the_store_behind_is_refused(disk, on, tmp_path, choice):
    stopped_at(on(disk, "first"), 32)
    choice = choice.replace("PATH", str(checkpoints(tmp_path / "first/pretrain/checkpoints")[0]))
    with pytest.raises(ValueError, match=r"holds this run at 40 samples: give another checkpoint.upload"):
        pipeline.train(on(disk, "second", f"checkpoint.resume={choice}"), "pretrain")


def test_resume_and_start_from_take_urls(place, on, tiny, tmp_path, whole):
    stopped_at(on(place, "first"), 48)
    name = checkpoints(tmp_path / "first/pretrain/checkpoints")[-1].name
    resumed = tiny(*SHORT, f"checkpoint.resume={place.url}/pretrain/checkpoints/{name}", run_dir=tmp_path / "resumed")
    assert pipeline.train(resumed, "pretrain") == "done"
    require_same_end_of_weights(tmp_path / "resumed", whole)
    assert pipeline.train(resumed, "pretrain") == "done"  # the URL is followed once
    assert pipeline.train(on(place, "first"), "pretrain") == "done"
    fresh = tiny(*SHORT, f"checkpoint.start_from={place.url}/pretrain/export", run_dir=tmp_path / "fresh")
    assert train_with_urls(fresh, Asked(8)) == "stopped"
    local = tiny(*SHORT, f"checkpoint.start_from={tmp_path}/first/pretrain/export", run_dir=tmp_path / "local")
    assert train(local, "pretrain", stop=Asked(8)) == "stopped"
    assert losses(tmp_path / "fresh") == losses(tmp_path / "local")


def train_with_urls(config: Any, stop: Stop) -> str:
    fetch(config, "pretrain")
    return train(config, "pretrain", stop=stop)


def require_same_end_of_weights(one: Path, other: Path) -> None:
    ends = [checkpoints(run / "pretrain" / "checkpoints")[-1] for run in (one, other)]
    ours, theirs = (load_file(path / "rank_00000.safetensors") for path in ends)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_what_is_not_whole_yet_at_a_url_is_not_taken(disk, on, tiny, tmp_path, whole):
    """Another run is uploading it. Once it is whole, the same command takes it."""
    assert pipeline.train(on(disk, "first"), "pretrain") == "done"
    at = tmp_path / "disk/pretrain"
    name = max(path.name for path in (at / "checkpoints").iterdir())
    for setting, last in (
        (f"start_from={disk.url}/pretrain/export", at / "done.json"),
        (f"resume={disk.url}/pretrain/checkpoints/{name}", at / "checkpoints" / name / "manifest.json"),
    ):
        config, content = tiny(*SHORT, f"checkpoint.{setting}", run_dir=tmp_path / last.name), last.read_bytes()
        last.unlink()
        with pytest.raises(ValueError, match=rf"{setting.partition('=')[2]} is not whole: the run that uploads it"):
            fetch(config, "pretrain")
        last.write_bytes(content)
        fetch(config, "pretrain")
        assert located(setting.partition("=")[2], tmp_path / last.name / "pretrain").is_dir()


def test_what_is_no_checkpoint_at_a_url_is_named(disk, tiny, tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    config = tiny(*SHORT, f"checkpoint.resume={disk.url}/empty")
    with pytest.raises(ValueError, match="holds neither a checkpoint nor an export: give the URL of"):
        pipeline.train(config, "pretrain")


def test_no_secret_is_written(s3, on, tmp_path, files_of, monkeypatch):
    monkeypatch.setenv("SPRESSO_TEST_TOKEN", "a-token-of-the-recipe")
    s3.proxy.fault = lambda method, name: "403" if "rank_" in name and len(s3.proxy.asked("rank_")) < 4 else ""
    stopped_at(on(s3, "run", "cluster.account=${oc.env:SPRESSO_TEST_TOKEN}"), 32)
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [content for content in written if SECRET.encode() in content]
    assert not [content for content in files_of(s3).values() if b"a-token-of-the-recipe" in content]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("checkpoint.upload=s3://AKIA:hunter2@bucket/run", "holds credentials"),
        ("checkpoint.resume=https://host/step_1?X-Amz-Signature=hunter2", "holds credentials"),
        ("checkpoint.upload=https://host/run", "HTTP has no folders to write to: take webdav://"),
        ("checkpoint.upload=memory://run", "gone with the process"),
        ("checkpoint.upload=runs/a", "is no URL: give one, such as s3://bucket/tiny"),
        ("checkpoint.upload=s33://bucket/a", "no package knows s33://, the nearest known one is s3://"),
    ],
)
def test_a_url_that_is_no_place_for_a_run_is_refused(setting, words, capsys):
    assert main(["plan", "tiny", setting]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "hunter2" not in said


def test_plan_says_whether_the_store_takes_uploads(s3, capsys):
    assert main(["plan", "tiny", f"checkpoint.upload={s3.url}"]) == 0
    assert f"{s3.url} takes uploads" in capsys.readouterr().out
    s3.proxy.fault = lambda method, name: "403" if method == "PUT" else ""
    assert main(["plan", "tiny", f"checkpoint.upload={s3.url}"]) == 0
    assert f"! checkpoint.upload={s3.url} can't be written: PermissionError" in capsys.readouterr().out
