"""`spresso decode -`: from standard input to standard output, while the stream comes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from launch.live_decode import wav_header
from models import bitstream
from tests.launch.codecs import sound, spresso

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stream(codec, tmp_path) -> Path:
    soundfile.write(tmp_path / "sound.flac", sound(3.1, 2, 44_100), 44_100)
    assert spresso("encode", tmp_path / "sound.flac", tmp_path / "sound.spr", "--codec", codec, "--live") == 0
    return tmp_path / "sound.spr"


@pytest.fixture
def piped(monkeypatch):
    """Return a function that runs `decode` with bytes on standard input: exit status, and what came out."""

    def run(data: bytes, *arguments: object) -> tuple[int, bytes]:
        output = io.BytesIO()
        stdout = SimpleNamespace(buffer=output, isatty=lambda: False)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(data))))
            patch.setattr(sys, "stdout", stdout)
            status = spresso("decode", *arguments)
        return status, output.getvalue()

    return run


def read(wav: bytes) -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(wav), always_2d=True)


@pytest.mark.parametrize("output", [["-"], []])
@pytest.mark.parametrize("options", [[], ["--rate", 16_000, "--steps", 1, "--seed", 5]])
def test_the_sound_is_that_of_the_file(codec, stream, piped, tmp_path, capsys, output, options):
    options += ["--codec", codec]
    status, wav = piped(stream.read_bytes(), "-", *output, *options)
    assert status == 0
    assert "3.100 s at 44100 Hz, 2 channel(s); the sound follows its codes by at most" in capsys.readouterr().err
    spresso("decode", stream, tmp_path / "file.wav", *options)
    live, rate = read(wav)
    expected, expected_rate = soundfile.read(tmp_path / "file.wav")
    assert (live.shape, rate) == (expected.shape, expected_rate)
    np.testing.assert_allclose(live, expected, rtol=0, atol=1e-4)


def test_a_file_is_decoded_to_standard_output(codec, stream, piped):
    assert piped(b"", stream, "-", "--codec", codec) == piped(stream.read_bytes(), "-", "--codec", codec)


def test_sound_comes_before_the_stream_has_ended(codec, tmp_path):
    """A real pipe whose writer waits for sound before it goes on."""
    soundfile.write(tmp_path / "long.wav", sound(20.0), 48_000)
    spresso("encode", tmp_path / "long.wav", tmp_path / "long.spr", "--codec", codec)
    data = (tmp_path / "long.spr").read_bytes()
    with subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "decode", "-", "--codec", str(codec), "--device", "cpu"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(data[: len(data) // 2])
        process.stdin.flush()
        early = process.stdout.read(44 + 2 * 48_000 * 5)
        process.stdin.write(data[len(data) // 2 :])
        process.stdin.close()
        late = process.stdout.read()
    assert process.returncode == 0
    assert len(read(early + late)[0]) == 960_000


@pytest.mark.parametrize("cut", [-5, -20])
def test_what_had_come_of_a_stream_is_decoded_and_the_rest_is_missed(codec, stream, piped, capsys, cut):
    status, wav = piped(stream.read_bytes()[:cut], "-", "--codec", codec)
    assert status == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("spresso: standard input: the .spr file is cut short or damaged")
    whole = piped(stream.read_bytes(), "-", "--codec", codec)[1]
    assert len(whole) // 2 < len(wav) < len(whole)
    assert wav[:44] == whole[:44]


def test_another_codecs_stream_is_refused_before_any_sound(codec, stream, piped, capsys):
    data = bytearray(stream.read_bytes())
    data[5] ^= 1
    assert piped(bytes(data[:40]), "-", "--codec", codec) == (2, b"")
    assert "spresso: standard input: the stream was made by model" in capsys.readouterr().err
    assert piped(bytes(data[:40]), "-") == (2, b"")
    assert "which is not under runs/: give its export with --codec FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"", b"SPR\x02\x00", b"RIFF and so on, which is no stream"])
def test_what_is_no_stream_is_refused(codec, piped, capsys, data):
    assert piped(data, "-", "--codec", codec) == (2, b"")
    assert capsys.readouterr().err.startswith("spresso: standard input: th")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-", "out.wav"], "write `spresso decode - > out.wav`"),
        (["-", "-", "--samples", 2], "standard output takes one sound"),
        ([".", "-"], "is a folder, but standard output takes one sound"),
        (["missing.spr", "-"], "missing.spr"),
    ],
)
def test_what_standard_output_does_not_take_is_refused(piped, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert piped(b"", *arguments) == (2, b"")
    assert message in capsys.readouterr().err


def test_no_sound_goes_to_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert spresso("decode", "-") == 2
    assert "pipe the sound into a player" in capsys.readouterr().err


def test_a_stream_that_is_not_in_order_is_decoded_and_says_so(codec, tmp_path, piped, capsys):
    soundfile.write(tmp_path / "sound.wav", sound(3.1, 2), 48_000)
    spresso("encode", tmp_path / "sound.wav", tmp_path / "sound.spr", "--codec", codec)
    spresso("info", tmp_path / "sound.spr", "--codec", codec)
    assert "encode it with --live" in capsys.readouterr().out
    status, wav = piped((tmp_path / "sound.spr").read_bytes(), "-", "--codec", codec)
    assert status == 0
    assert "spresso encode --live" in capsys.readouterr().err
    assert read(wav)[0].shape == (148_800, 2)


def test_a_folder_is_encoded_again_to_be_decoded_live(codec, tmp_path, capsys):
    (tmp_path / "sounds").mkdir()
    soundfile.write(tmp_path / "sounds" / "stereo.wav", sound(0.3, 2), 48_000)
    for options, expected in (([], "1 done"), (["--live"], "1 done"), (["--live"], "1 already there")):
        spresso("encode", tmp_path / "sounds", tmp_path / "out", "--codec", codec, *options)
        assert expected in capsys.readouterr().err
    assert bitstream.read_header((tmp_path / "out" / "stereo.wav.spr").read_bytes())[0].interleaved


@pytest.mark.parametrize("channels", [1, 2])
def test_the_header_is_that_of_a_file(channels):
    file = io.BytesIO()
    soundfile.write(file, np.zeros((100, channels)), 44_100, format="WAV", subtype="PCM_16")
    assert wav_header(44_100, channels, 100) == file.getvalue()[:44]


def test_a_sound_that_is_too_long_for_the_header_has_no_end():
    assert wav_header(48_000, 2, 2**31)[40:] == b"\xff" * 4
