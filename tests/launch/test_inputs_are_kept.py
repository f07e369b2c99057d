"""`spresso encode` and `decode` replace what they wrote, and nothing else: no input, no file of anybody else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import soundfile

from launch import conversions
from tests.launch.codecs import content, sound, spresso


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with the sounds a.wav and b.wav."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate("ab"):
        soundfile.write(tmp_path / f"{name}.wav", sound(0.1, seed=number), 48_000)
    return tmp_path


def refused(capsys, *arguments: object) -> str:
    """The one line of a refusal; no codec was loaded before it."""
    assert spresso(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize(
    "target", ["a.wav", "b.wav", "./a.wav", "c.wav", "link.spr", "hard.spr", "notes.txt", "folder"]
)
def test_encode_writes_no_sound_no_input_and_no_foreign_file(codec, place, capsys, target, force):
    Path("link.spr").symlink_to("a.wav")
    os.link("a.wav", "hard.spr")
    Path("notes.txt").write_text("precious")
    Path("folder").mkdir()
    before = content(place)
    line = refused(capsys, "encode", "a.wav", target, "--codec", codec, *force)
    assert Path(target).name in line
    assert content(place) == before


def test_each_refusal_says_what_stands_there(codec, place, capsys):
    os.link("a.wav", "hard.spr")
    Path("link.spr").symlink_to("b.wav")
    Path("notes").write_text("precious")
    os.mkfifo("pipe.spr")
    for target, words in {
        "b.wav": "b.wav is the name of a sound",
        "hard.spr": "hard.spr is an input of this command",
        "link.spr": "link.spr is a link to b.wav",
        "notes": "notes was not written by `spresso encode`",
        "pipe.spr": "pipe.spr is a pipe",
        "/dev/null": "/dev/null is a device",
        "-": "- is no file",
        ".": "give a file as output, such as a.wav.spr",
    }.items():
        assert words in refused(capsys, "encode", "a.wav", target, "--codec", codec)
    assert Path("/dev/null").is_char_device()


def test_an_empty_file_and_an_own_stream_are_replaced(codec, place):
    Path("x.spr").touch()
    assert spresso("encode", "a.wav", "x.spr", "--codec", codec) == 0
    first = Path("x.spr").read_bytes()
    assert spresso("encode", "b.wav", "x.spr", "--codec", codec) == 0
    assert Path("x.spr").read_bytes()[:3] == b"SPR"
    assert Path("x.spr").read_bytes() != first


def test_decode_replaces_its_own_sounds_and_no_others(codec, place, capsys):
    before = content(place)
    spresso("encode", "a.wav", "x.spr", "--codec", codec)
    capsys.readouterr()
    for target in ("a.wav", "b.wav"):
        line = refused(capsys, "decode", "x.spr", target, "--codec", codec, "--force")
        assert f"{target} was not written by `spresso decode`" in line
    assert {name: content(place)[name] for name in before} == before
    for suffix in (".wav", ".flac", ".ogg"):
        assert spresso("decode", "x.spr", f"y{suffix}", "--codec", codec) == 0
        first = Path(f"y{suffix}").read_bytes()
        assert spresso("decode", "x.spr", f"y{suffix}", "--codec", codec, "--seed", 1) == 0
        assert Path(f"y{suffix}").read_bytes() != first
    assert spresso("decode", "x.spr", "z.wav", "--codec", codec) == 0
    soundfile.write("z.1.wav", sound(0.1), 48_000)
    capsys.readouterr()
    assert "z.1.wav was not written" in refused(capsys, "decode", "x.spr", "z.wav", "--codec", codec, "--samples", 2)
    assert not Path("z.0.wav").exists()


def test_a_folder_encoded_and_decoded_in_place_keeps_its_sounds(codec, place, capsys):
    before = content(place)
    assert spresso("encode", ".", ".", "--codec", codec) == 0
    for force in ((), ("--force",)):
        assert spresso("decode", ".", ".", "--codec", codec, *force) == 1
        told = capsys.readouterr().err
        assert "a.wav was not written by `spresso decode`" in told
        assert "0 done, 0 already there, 2 failed" in told
    assert {name: content(place)[name] for name in before} == before
    assert spresso("encode", ".", ".", "--codec", codec) == 0
    assert "0 done, 2 already there" in capsys.readouterr().err


def test_what_stands_in_a_folder_is_kept_and_the_rest_goes_on(codec, place, capsys):
    Path("streams").mkdir()
    Path("streams/a.wav.spr").write_text("a letter")
    assert spresso("encode", ".", "streams", "--codec", codec) == 1
    told = capsys.readouterr().err
    assert told.index("a.wav.spr was not written by") < told.index("1 done, 0 already there, 1 failed")
    assert Path("streams/a.wav.spr").read_text() == "a letter"
    Path("streams/a.wav.spr").unlink()
    Path("streams/a.wav.spr").symlink_to("../a.wav")
    assert spresso("encode", ".", "streams", "--codec", codec, "--force") == 1
    assert "is an input of this command" in capsys.readouterr().err
    assert Path("streams/a.wav.spr").is_symlink()


def test_decoding_again_goes_on_and_other_settings_decode_again(codec, place, capsys):
    spresso("encode", ".", "streams", "--codec", codec)
    for options, counts in (
        ((), "2 done, 0 already there"),
        ((), "0 done, 2 already there"),
        (("--seed", 1), "2 done, 0 already there"),
        (("--seed", 1, "--steps", 1), "2 done, 0 already there"),
        (("--rate", 16_000), "2 done, 0 already there"),
        (("--samples", 2), "2 done, 0 already there"),
        (("--samples", 2), "0 done, 2 already there"),
    ):
        capsys.readouterr()
        assert spresso("decode", "streams", "back", "--codec", codec, *options) == 0
        assert counts in capsys.readouterr().err
    os.utime("streams/a.wav.spr")
    Path("streams/b.wav.spr").write_bytes(Path("streams/a.wav.spr").read_bytes())
    assert spresso("decode", "streams", "back", "--codec", codec, "--samples", 2) == 0
    assert "1 done, 1 already there" in capsys.readouterr().err


def test_streams_that_would_be_one_sound_are_all_refused(codec, place, capsys):
    spresso("encode", "a.wav", "in/a.spr", "--codec", codec)
    spresso("encode", "b.wav", "in/a.wav.spr", "--codec", codec)
    spresso("encode", "b.wav", "in/b.spr", "--codec", codec)
    capsys.readouterr()
    assert spresso("decode", "in", "back", "--codec", codec) == 1
    told = capsys.readouterr().err
    assert "in/a.spr and in/a.wav.spr would both be written to back/a.wav" in told
    assert "in/a.wav.spr and in/a.spr would both be written to back/a.wav" in told
    assert set(content(Path("back"))) == {"b.wav"}


@pytest.mark.parametrize("ignored", [False, True])
def test_names_that_differ_only_in_case_are_named(codec, place, capsys, monkeypatch, ignored):
    """On a disk that ignores case they are refused; elsewhere both are encoded."""
    Path("in").mkdir()
    for name in ("Door.wav", "door.wav", "other.wav"):
        soundfile.write(f"in/{name}", sound(0.1), 48_000)
    monkeypatch.setattr(conversions, "_ignores_case", lambda folder: ignored)
    assert spresso("encode", "in", "out", "--codec", codec) == int(ignored)
    told = capsys.readouterr().err
    if ignored:
        assert "in/Door.wav and in/door.wav would both be written to" in told
        assert set(content(Path("out"))) == {"other.wav.spr"}
    else:
        assert "Door.wav.spr and out/door.wav.spr are one file on a disk that ignores case" in told
        assert len(content(Path("out"))) == 3


def test_this_disk_tells_case_apart_or_not(tmp_path):
    (tmp_path / "Folder").mkdir()
    assert conversions._ignores_case(tmp_path / "Folder" / "new" / "one") == (tmp_path / "fOLDER").exists()


def test_a_foreign_report_is_kept(codec, place, capsys):
    Path("out").mkdir()
    Path("out/encode.report.json").write_text('{"mine": 1}')
    assert spresso("encode", ".", "out", "--codec", codec) == 2
    assert "encode.report.json was not written by `spresso encode`" in capsys.readouterr().err
    assert Path("out/encode.report.json").read_text() == '{"mine": 1}'
    assert not content(Path("out"))
