"""Each stage has one owner, whoever starts it; a second one is told so in a line, or waits where that is right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import local, owner, pipeline
from launch.cli import main
from launch.slurm.attempt import TOKEN
from trainer import loop
from trainer.evaluate import evaluation

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from launch import owner
with owner.training(Path(sys.argv[1])) if sys.argv[2] == "train" else owner.holding(Path(sys.argv[1])):
    print("owns", flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    monkeypatch.delenv("RANK", raising=False)


class Other:
    """Another process, which owns a folder until it is told to end."""

    def __init__(self, folder: Path, how: str = "whole") -> None:
        command = [sys.executable, "-c", HOLD, str(folder), how]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)
        assert self.process.stdout.readline() == "owns\n"

    def end(self) -> None:
        self.process.communicate("\n")


@pytest.fixture
def own() -> Iterator[type[Other]]:
    others = []

    def start(folder: Path, how: str = "whole") -> Other:
        others.append(Other(folder, how))
        return others[-1]

    yield start
    for other in others:
        other.process.kill()
        other.process.wait()


def refused(arguments: list[str], other: Other, folder: Path, capsys) -> bool:
    """Whether a command ends with status 2 and one line that names the other process."""
    capsys.readouterr()
    status = main(arguments)
    told = capsys.readouterr().err.splitlines()
    return status == 2 and told[-1].startswith(f"spresso: {folder} is in use by process {other.process.pid} on ")


@pytest.mark.parametrize(("rank", "owns"), [(None, True), ("0", True), ("1", False)])
def test_under_a_launcher_rank_0_owns_the_stage(tiny, tmp_path, monkeypatch, rank, owns):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    folder = tmp_path / "run" / "pretrain"

    def train(config, stage, *, stop, require_ownership) -> str:
        held = owner.holder(folder)
        assert (held is not None and held.pid == os.getpid()) == owns
        require_ownership()
        return "done"

    monkeypatch.setattr(loop, "train", train)
    assert local.train_here(tiny(), "pretrain") == "done"
    assert owner.holder(folder) is None
    assert TOKEN not in os.environ


@pytest.mark.parametrize("rank", [None, "0"])
def test_a_second_start_of_a_stage_is_refused_by_any_launcher(own, tmp_path, prepared, monkeypatch, capsys, rank):
    if rank is not None:
        launched = {"RANK": rank, "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        for name, value in launched.items():
            monkeypatch.setenv(name, value)
    folder = tmp_path / "run" / "pretrain"
    other = own(folder, "train")
    arguments = ["train", "tiny", "stage=pretrain", f"run_dir={folder.parent}", f"data.latents={prepared}/latents"]
    assert refused(arguments, other, folder, capsys)
    assert not (folder / "config.yaml").exists()


def test_of_two_runs_the_second_changes_nothing(own, tmp_path, prepared, capsys):
    run = tmp_path / "run"
    other = own(run)
    assert refused(["run", "tiny", f"run_dir={run}", f"data.latents={prepared}/latents"], other, run, capsys)
    assert not (run / "config.yaml").exists()


def test_who_is_superseded_ends_with_a_line(tmp_path, prepared, monkeypatch, capfd):
    calls = []

    def require(folder: Path) -> None:
        calls.append(1)
        if len(calls) > 4:
            raise owner.Superseded(f"{folder} was taken over by process 1 on elsewhere: this rank ends")

    monkeypatch.setattr(owner, "require", require)
    run = tmp_path / "run"
    settings = [f"run_dir={run}", f"data.latents={prepared}/latents", "parallel.threads=1", "pretrain.samples=64"]
    assert main(["train", "tiny", "stage=pretrain", "log.every=8", *settings]) == 2
    told = capfd.readouterr().err
    assert f"spresso: {run}/pretrain was taken over by process 1 on elsewhere: this rank ends" in told
    assert "Traceback" not in told + (run / "pretrain/logs/rank_0.log").read_text()


def test_synth_is_refused(own, tmp_path, capsys):
    folder = tmp_path / "sounds"
    other = own(folder)
    assert refused(["synth", str(folder), "--hours", "0.001", "--workers", "1"], other, folder, capsys)
    other.end()
    assert main(["synth", str(folder), "--hours", "0.001", "--workers", "1"]) == 0
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_prepare_waits_and_then_takes_what_is_made(own, tiny, tmp_path, prepared, monkeypatch):
    config = tiny(f"data.latents={tmp_path}/latents", "data.workers=1")
    other, said = own(tmp_path / "latents"), []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("  waits: "):
            other.end()

    monkeypatch.setattr(pipeline, "say", say)
    pipeline.prepare_latents(config)
    assert (
        said[0]
        == f"  waits: {tmp_path}/latents is in use by process {other.process.pid} on " + said[0].partition(" on ")[2]
    )
    for split in ("train", "test"):
        theirs = sorted(path.name for path in (prepared / "latents" / split).iterdir())
        assert sorted(path.name for path in (tmp_path / "latents" / split).iterdir()) == theirs
    own(tmp_path / "latents")
    pipeline.prepare_latents(config)  # finished sets belong to all


def test_another_part_s_work_with_other_settings_is_not_removed(tiny, tmp_path, monkeypatch):
    latents = tmp_path / "latents"
    config = tiny(f"data.latents={latents}", "data.workers=1", "data.shard_mb=0.5")
    pipeline.prepare_latents(config, part=0, parts=2)
    made = sorted(latents.rglob("*.tar"))
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace("owner.holding(Path(sys.argv[1]))", _PART), str(latents), "part"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "owns\n"
        config.data.holdout = 0.5
        with pytest.raises(ValueError, match=f"in use by process {other.pid} on"):
            pipeline.prepare_latents(config, part=1, parts=2)
        assert made
        assert sorted(latents.rglob("*.tar")) == made
    finally:
        other.communicate("\n")
    pipeline.prepare_latents(config, part=1, parts=2)


_PART = "owner.holding(Path(sys.argv[1]), part=0, parts=2)"


def test_evaluate_and_page_are_refused(own, tiny, tmp_path, monkeypatch):
    config = tiny()

    def evaluate_part(config, *, part, parts, sole):
        with sole():
            return {}

    monkeypatch.setattr(evaluation, "evaluate_part", evaluate_part)
    other = own(tmp_path / "run" / "evaluate")
    for command in (pipeline.evaluate, pipeline.page):
        with pytest.raises(ValueError, match=f"evaluate is in use by process {other.process.pid}"):
            command(config)
    other.end()
    other = own(tmp_path / "run" / "page")
    with pytest.raises(ValueError, match=f"page is in use by process {other.process.pid}"):
        pipeline.page(config)
