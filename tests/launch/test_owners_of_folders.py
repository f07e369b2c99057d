"""Folders that `encode`, `decode`, `index` and `listen-test` write into have one owner each while they write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import soundfile

from launch import owner, pipeline
from tests.launch.codecs import content, sound, spresso
from tests.launch.test_owners_of_stages import Other

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests/golden/old_run"
WRITE = """
import json, sys
from pathlib import Path
from launch import conversions, pipeline
from launch.cli import main
from trainer.data import index
from trainer.evaluate import listening_test

def after_a_line(write):
    def waits(*arguments, **options):
        print("owns", flush=True)
        input()
        return write(*arguments, **options)
    return waits

conversions._convert_all = after_a_line(conversions._convert_all)
index.index_folder = after_a_line(index.index_folder)
listening_test._require_own = after_a_line(listening_test._require_own)
pipeline._evaluated = lambda config: json.loads(Path("runs/old/evaluate/evaluation.json").read_text())
sys.exit(main(sys.argv[1:]))
"""
"""Runs a command, which waits for a line once it owns its folder. Whether the old run is finished is not looked at."""
Command = list[object]


def start(command: Command) -> subprocess.Popen[str]:
    """Start a command in a process of its own, and return once it owns its folder."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", WRITE, *map(str, command)], env=environment, **pipes)
    assert process.stdout.readline() == "owns\n", process.stderr.read()
    return process


@pytest.fixture
def started() -> Iterator[Callable[[Command], subprocess.Popen[str]]]:
    processes = []

    def start_one(command: Command) -> subprocess.Popen[str]:
        processes.append(start(command))
        return processes[-1]

    yield start_one
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def commands(codec, tmp_path, monkeypatch) -> dict[str, tuple[Command, Path]]:
    """Each command, and the folder that it writes into."""
    monkeypatch.chdir(tmp_path)
    sounds = Path("sounds")
    sounds.mkdir()
    for name in ("a.wav", "b.flac"):
        soundfile.write(sounds / name, sound(0.3), 48_000)
    assert spresso("encode", sounds, "streams", "--codec", codec) == 0
    shutil.copytree(OLD, "runs/old")
    report = json.loads((OLD / "evaluate/evaluation.json").read_text())
    monkeypatch.setattr(pipeline, "_evaluated", lambda config: report)
    return {
        "encode": (["encode", sounds, "out", "--codec", codec], Path("out")),
        "decode": (["decode", "streams", "back", "--codec", codec, "--device", "cpu"], Path("back")),
        "index": (["index", "runs/old/latents/train"], Path("runs/old/latents/train")),
        "index of both parts": (["index", "runs/old/latents"], Path("runs/old/latents")),
        "listen-test": (["listen-test", "runs/old/config.yaml", "test", "--clips", "1"], Path("test")),
    }


def records(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".owner*")]


NAMES = ("encode", "decode", "index", "index of both parts", "listen-test")


@pytest.mark.parametrize("name", NAMES)
def test_of_two_commands_the_second_is_told_in_a_line(commands, started, capsys, name):
    command, folder = commands[name]
    first = started(command)
    before = content(folder)
    capsys.readouterr()
    assert spresso(*command) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(f"spresso: {folder} is in use by process {first.pid} on ")
    assert "Traceback" not in "\n".join(told)
    assert content(folder) == before
    _, said = first.communicate("\n\n")  # an index of two parts is written twice
    assert first.returncode == 0, said
    assert records(folder) == []
    assert content(folder) != {}


@pytest.mark.parametrize("name", NAMES)
def test_the_record_of_a_killed_owner_is_in_nobodys_way(commands, capsys, name):
    command, folder = commands[name]
    assert spresso(*command) == 0
    made = content(folder)
    other = Other(folder)
    other.process.kill()
    other.process.wait()
    assert records(folder) == [".owner.json"]
    capsys.readouterr()
    assert spresso(*command) == 0
    assert "hidden" not in capsys.readouterr().err
    assert content(folder) == made
    assert records(folder) == []


def test_streams_that_are_being_written_can_be_read(commands, capsys):
    command, folder = commands["decode"]
    with owner.holding(Path("streams")):
        assert spresso(*command) == 0
    assert "hidden" not in capsys.readouterr().err
    assert sorted(content(folder)) == ["a.wav", "b.flac"]


@pytest.mark.parametrize("options", [[], ["--autoencoder", "spectral"]])
def test_no_folder_is_made_for_an_index(tmp_path, capsys, options):
    assert spresso("index", tmp_path / "missing", *options) == 2
    assert f"{tmp_path}/missing is not a folder: give one that holds tars of latents" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists()


def test_a_foreign_report_is_named_before_a_folder_is_owned(commands, capsys):
    command, folder = commands["encode"]
    folder.mkdir()
    (folder / "encode.report.json").write_text("mine")
    assert spresso(*command) == 2
    assert "encode.report.json was not written by `spresso encode`" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["encode.report.json"]


def test_a_set_is_verified_while_another_process_owns_it(commands):
    with owner.holding(Path("runs/old/latents/train")):
        assert spresso("index", "runs/old/latents/train", "--verify", "--workers", 1) == 0
