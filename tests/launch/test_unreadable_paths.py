"""A path that can't be read is named with its reason, wherever a command reads it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import soundfile

from tests.launch.codecs import sound, spresso


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("broken.wav", "broken.spr", "broken.yaml"):
        Path(name).symlink_to("nowhere")
    for name in ("folder.wav", "folder.yaml", "export"):
        Path(name).mkdir()
    os.mkfifo("pipe.wav")
    soundfile.write("good.wav", sound(0.1), 48_000)
    return tmp_path


def line(capsys, *arguments: object) -> str:
    assert spresso(*arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_of_a_sound_or_a_stream(codec, place, capsys):
    for name, reason in (
        ("missing.wav", "is missing"),
        ("broken.wav", "is a link to nowhere, which is missing"),
        ("pipe.wav", "is a pipe, not a file"),
        ("good.wav/in.wav", "is missing: a part of its path is a file, not a folder"),
    ):
        assert line(capsys, "encode", name, "x.spr", "--codec", codec) == f"spresso: {name} {reason}"
        assert line(capsys, "decode", name, "y.wav", "--codec", codec) == f"spresso: {name} {reason}"
        assert line(capsys, "info", name) == f"spresso: {name} {reason}"
    assert line(capsys, "info", "folder.wav") == "spresso: folder.wav is a folder, not a file"


def test_of_files_in_a_folder(codec, place, capsys):
    Path("in").mkdir()
    for name in ("broken.wav", "pipe.wav", "good.wav"):
        Path(name).rename(Path("in", name))
    status = spresso("encode", "in", "out", "--codec", codec)
    told = capsys.readouterr().err
    assert "1 done" in told
    if status:  # unless the listing leaves them out
        assert "in/broken.wav is a link to nowhere, which is missing" in told
        assert "in/pipe.wav is a pipe, not a file" in told
    Path("out/x.spr").symlink_to("nowhere")
    assert spresso("decode", "out", "back", "--codec", codec) == 1
    assert "out/x.spr is a link to nowhere, which is missing" in capsys.readouterr().err


def test_of_a_codec(codec, place, capsys):
    for name, reason in (
        ("missing", "missing is missing: give an export folder"),
        ("good.wav", "good.wav is a file, not a folder: give an export folder"),
        ("export", "export holds no codec: give an export folder"),
    ):
        for command in (("encode", "good.wav", "x.spr"), ("info", "good.wav")):
            if (command[0], name) != ("info", "export"):
                assert reason in line(capsys, *command, "--codec", name)
    for part in ("adapter_model.safetensors", "upsampler.safetensors", "dit.safetensors"):
        for path in codec.iterdir():
            if path.name != part:
                Path("export", path.name).write_bytes(path.read_bytes())
        Path("export", part).unlink(missing_ok=True)
        assert f"export/{part} is missing" in line(capsys, "encode", "good.wav", "x.spr", "--codec", "export")
    Path("export/codec.json").write_text("[]")
    assert "export/codec.json is damaged" in line(capsys, "encode", "good.wav", "x.spr", "--codec", "export")


def test_of_a_recipe_and_its_sounds(place, capsys):
    Path("m.csv").write_text("file\n" + "".join(f"gone/{letter}.wav\n" for letter in "abcd"))
    quick = ("run_dir=run", "data.workers=1", "data.holdout=0.4")
    for name, reason in (
        ("missing.yaml", "missing.yaml is missing"),
        ("broken.yaml", "broken.yaml is a link to nowhere, which is missing"),
        ("folder.yaml", "folder.yaml is a folder, not a file"),
    ):
        assert f"because {reason}" in line(capsys, "plan", name)
        assert f"because {reason}" in line(capsys, "plan", "tiny", f"cluster={name}")
    assert "data.audio=gone is missing: give a folder of sounds" in line(capsys, "prepare", "tiny", "data.audio=gone")
    told = line(capsys, "prepare", "tiny", "data.audio=m.csv", *quick)
    assert "none of the 4 sound files can be used: gone/a.wav is missing; gone/b.wav is missing" in told


def test_a_damaged_export_under_runs_does_not_stop_info(codec, place, capsys):
    assert spresso("encode", "good.wav", "x.spr", "--codec", codec) == 0
    Path("runs/one/finetune/export").mkdir(parents=True)
    Path("runs/one/finetune/export/codec.json").write_text("{half")
    assert spresso("info", "x.spr") == 0
    assert "not found under runs/" in capsys.readouterr().out
