"""`spresso encode` and `decode` of folders with odd names, links, and files that are none."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from launch.cli import main
from models.backbones.pretrained import load_dit
from models.dit import DiT
from models.weights import save_weights
from tests.models.test_codec import DIT, make_codec


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codec")
    torch.manual_seed(1)
    save_weights(folder / "dit.safetensors", DiT(DIT).state_dict(), dataclasses.asdict(DIT))
    made = make_codec(load_dit(folder / "dit.safetensors"))
    made.save_pretrained(folder / "export", base=folder / "dit.safetensors", card="")
    return folder / "export"


def write(path: Path | bytes) -> None:
    path = Path(os.fsdecode(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        soundfile.write(file, np.random.default_rng(0).normal(size=4800) * 0.1, 48_000, format="WAV")


def there_and_back(codec: Path, sounds: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> list[bytes]:
    """Return the names of the decoded files."""
    assert main(["encode", str(sounds), str(out / "streams"), "--codec", str(codec)]) == 0
    assert main(["decode", str(out / "streams"), str(out / "back"), "--codec", str(codec)]) == 0
    assert "\x1b" not in capsys.readouterr().err
    return sorted(os.fsencode(path.relative_to(out / "back")) for path in (out / "back").rglob("*.wav"))


def test_any_name_goes_there_and_back(codec, tmp_path, capsys):
    names = [
        b"caf\xe9.wav",
        b"T\xfcr/x.wav",
        b"new\nline \x1b[31m.wav",
        "門が開く 🚪.wav".encode(),
        b"x" * 241 + b".wav",
    ]
    for name in names:
        write(os.fsencode(tmp_path / "sounds") + b"/" + name)
    assert there_and_back(codec, tmp_path / "sounds", tmp_path, capsys) == sorted(names)


def test_names_that_are_not_utf8_are_said(codec, tmp_path, capsys):
    for name in (b"caf\xe9.wav", b"plain.wav"):
        write(os.fsencode(tmp_path / "sounds") + b"/" + name)
    assert main(["encode", str(tmp_path / "sounds"), str(tmp_path / "streams"), "--codec", str(codec)]) == 0
    said = capsys.readouterr().err
    assert r"spresso: 1 name is not UTF-8, which some programs can't open: caf\xe9.wav" in said


def test_linked_folders_go_there_and_back(codec, tmp_path, capsys):
    write(tmp_path / "disk/a.wav")
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds/linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/round").symlink_to(tmp_path)
    assert there_and_back(codec, tmp_path / "sounds", tmp_path, capsys) == [b"linked/a.wav"]


def test_what_is_no_sound_is_named_and_counted(codec, tmp_path, capsys):
    sounds = tmp_path / "sounds"
    write(sounds / "a.wav")
    write(sounds / "runs/one/page/audio/decoded.wav")
    (sounds / "runs/one/latents").mkdir()
    (sounds / "runs/one/latents/report.json").touch()
    os.mkfifo(sounds / "pipe\x1b[31m.wav")
    (sounds / "broken.wav").symlink_to("nowhere.wav")
    for name in ("empty.wav", "cover.jpg", "speech.m4a", ".hidden"):
        (sounds / name).touch()
    assert main(["encode", str(sounds), str(tmp_path / "out"), "--codec", str(codec)]) == 1
    said = capsys.readouterr().err
    assert "1 done, 0 already there, 4 failed; passed over .jpg (1), directories of runs (1), hidden (1)" in said
    assert "pipe\\x1b[31m.wav is a pipe" in said
    assert "broken.wav is a link to nowhere.wav, which is missing" in said
    for name in ("empty.wav", "speech.m4a"):
        assert f"{name} can't be read as sound" in said
    os.mkfifo(tmp_path / "out/pipe.spr")
    (tmp_path / "out/notes.txt").touch()
    assert main(["decode", str(tmp_path / "out"), str(tmp_path / "back"), "--codec", str(codec)]) == 1
    said = capsys.readouterr().err
    assert "pipe.spr is a pipe" in said
    assert "1 done, 0 already there, 1 failed; passed over .txt (1)" in said
