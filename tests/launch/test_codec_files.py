"""`spresso encode`, `decode` and `info`: files and folders, at any rate, with faults among them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from models import bitstream
from models.codec import SPresso
from tests.launch.codecs import content, sound, spresso


@pytest.fixture
def sounds(tmp_path) -> Path:
    folder = tmp_path / "sounds"
    (folder / "deep" / "deeper").mkdir(parents=True)
    soundfile.write(folder / "mono.wav", sound(0.3), 48_000)
    soundfile.write(folder / "deep" / "stereo.flac", sound(0.3, 2, 44_100), 44_100)
    soundfile.write(folder / "deep" / "deeper" / "fast.wav", sound(0.2, 1, 96_000)[:-1], 96_000)
    (folder / ".hidden.wav").write_bytes(b"not looked at")
    return folder


def test_a_folder_there_and_back(codec, sounds, tmp_path, capsys):
    assert spresso("encode", sounds, tmp_path / "out", "--codec", codec) == 0
    assert "3 done, 0 already there, 0 failed" in capsys.readouterr().err
    streams = content(tmp_path / "out")
    assert set(streams) == {"mono.wav.spr", "deep/stereo.flac.spr", "deep/deeper/fast.wav.spr"}
    assert spresso("decode", tmp_path / "out", tmp_path / "back", "--codec", codec) == 0
    for name, rate, channels, samples in (
        ("mono.wav", 48_000, 1, 14_400),
        ("deep/stereo.flac", 44_100, 2, 13_230),
        ("deep/deeper/fast.wav", 96_000, 1, 19_199),
    ):
        found = soundfile.info(tmp_path / "back" / name)
        assert (found.samplerate, found.channels, found.frames) == (rate, channels, samples)


def test_what_is_there_is_not_done_again_unless_forced(codec, sounds, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    spresso("encode", sounds, out, "--codec", codec)
    spresso("decode", out, back, "--codec", codec)
    (out / "mono.wav.spr").write_bytes((out / "mono.wav.spr").read_bytes()[:-1])
    (back / "deep" / "stereo.flac").unlink()
    os.utime(sounds / "deep" / "deeper" / "fast.wav")  # its date is new, its content is not
    soundfile.write(sounds / "deep" / "stereo.flac", sound(0.2, 2, 44_100), 44_100)
    capsys.readouterr()
    spresso("encode", sounds, out, "--codec", codec)
    assert "2 done, 1 already there" in capsys.readouterr().err
    spresso("decode", out, back, "--codec", codec)
    assert "1 done, 2 already there" in capsys.readouterr().err  # the cut stream is again what it was
    assert soundfile.info(back / "deep" / "stereo.flac").frames == 8820
    written = {path: path.stat().st_mtime_ns for path in back.rglob("*.[wf]*")}
    spresso("decode", out, back, "--codec", codec)
    assert "0 done, 3 already there" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in back.rglob("*.[wf]*")} == written
    spresso("encode", sounds, out, "--codec", codec, "--books", 2)
    assert "3 done, 0 already there" in capsys.readouterr().err
    spresso("encode", sounds, out, "--codec", codec, "--books", 2, "--force")
    assert "3 done, 0 already there" in capsys.readouterr().err


def test_faults_are_named_and_the_rest_goes_on(codec, sounds, tmp_path, capsys):
    (sounds / "bad.wav").write_bytes(b"RIFF and then nothing")
    soundfile.write(sounds / "wide.wav", sound(0.1, 9), 48_000)
    assert spresso("encode", sounds, tmp_path / "out", "--codec", codec) == 1
    told = capsys.readouterr().err
    assert "bad.wav can't be read" in told
    assert "wide.wav: " in told
    assert "channels from 1 to 8" in told
    assert "3 done, 0 already there, 2 failed" in told
    (tmp_path / "out" / "cut.spr").write_bytes(b"SPR\2abc")
    (tmp_path / "out" / "mono.spr").write_bytes((tmp_path / "out" / "mono.wav.spr").read_bytes())
    assert spresso("decode", tmp_path / "out", tmp_path / "back", "--codec", codec) == 1
    told = capsys.readouterr().err
    assert "cut.spr: the .spr file is cut short" in told
    assert "would both be written to" in told
    assert "2 done, 0 already there, 3 failed" in told
    assert set(content(tmp_path / "back")) == {"deep/stereo.flac", "deep/deeper/fast.wav"}
    report = json.loads((tmp_path / "back" / "decode.report.json").read_text())
    assert (report["files"], report["done"], report["failed"], report["finished"]) == (5, 2, 3, True)
    assert {Path(problem["file"]).name for problem in report["problems"]} == {"cut.spr", "mono.spr", "mono.wav.spr"}


def test_a_file_is_the_same_alone_and_in_a_folder(codec, sounds, tmp_path):
    """Whatever else is there, and whatever was decoded before."""
    spresso("encode", sounds, tmp_path / "out", "--codec", codec)
    spresso("decode", tmp_path / "out", tmp_path / "back", "--codec", codec, "--seed", 7)
    stereo = Path("deep/stereo.flac")
    assert spresso("encode", sounds / stereo, tmp_path / "one.spr", "--codec", codec) == 0
    assert (tmp_path / "one.spr").read_bytes() == (tmp_path / "out" / f"{stereo}.spr").read_bytes()
    assert spresso("decode", tmp_path / "one.spr", tmp_path / "one.flac", "--codec", codec, "--seed", 7) == 0
    alone, among = (soundfile.read(path)[0] for path in (tmp_path / "one.flac", tmp_path / "back" / stereo))
    assert np.array_equal(alone, among)
    assert spresso("decode", tmp_path / "one.spr", tmp_path / "two.flac", "--codec", codec, "--seed", 8) == 0
    assert not np.array_equal(alone, soundfile.read(tmp_path / "two.flac")[0])


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000, 192_000])
@pytest.mark.parametrize("samples", [1, 2, 4_409])
def test_any_rate_and_length_comes_back(codec, tmp_path, rate, samples):
    soundfile.write(tmp_path / "in.wav", sound(1)[:samples], rate)
    assert spresso("encode", tmp_path / "in.wav", tmp_path / "x.spr", "--codec", codec) == 0
    assert spresso("decode", tmp_path / "x.spr", tmp_path / "back.wav", "--codec", codec) == 0
    found = soundfile.info(tmp_path / "back.wav")
    assert (found.samplerate, found.frames) == (rate, samples)
    assert spresso("decode", tmp_path / "x.spr", tmp_path / "back.wav", "--codec", codec, "--rate", 16_000) == 0
    found = soundfile.info(tmp_path / "back.wav")
    assert (found.samplerate, found.frames) == (16_000, -(-samples * 16_000 // rate))


def test_a_resampled_sound_is_in_time_and_in_tune(codec, tmp_path, monkeypatch):
    """Through a codec that loses nothing: a tone at 44.1 kHz comes back as it was."""
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(44_100 * 3) / 44_100)[:, None] * np.hanning(44_100 * 3)[:, None]
    kept = []
    monkeypatch.setattr("models.encoding._RowEncoder.push", lambda self, x0, *, last: kept.append(x0))
    monkeypatch.setattr(SPresso, "z_to_x0", lambda self, z, noise, **_: kept[0][..., : noise.shape[-1]])
    soundfile.write(tmp_path / "in.wav", tone, 44_100, subtype="FLOAT")
    spresso("encode", tmp_path / "in.wav", tmp_path / "x.spr", "--codec", codec)
    spresso("decode", tmp_path / "x.spr", tmp_path / "back.wav", "--codec", codec)
    back = soundfile.read(tmp_path / "back.wav")[0][:, None]
    assert np.sqrt(np.mean((back - tone) ** 2)) < 0.05 * np.sqrt(np.mean(tone**2))


def test_info_tells_what_a_stream_holds_and_costs(codec, tmp_path, capsys):
    soundfile.write(tmp_path / "in.wav", sound(2.0), 48_000)
    spresso("encode", tmp_path / "in.wav", tmp_path / "x.spr", "--codec", codec)
    encoded = capsys.readouterr().err
    assert spresso("info", tmp_path / "x.spr", "--codec", codec) == 0
    told = capsys.readouterr().out
    data = (tmp_path / "x.spr").read_bytes()
    header, payload = bitstream.read_header(data)
    assert header.prior
    plain, coded, whole = 23 * 12 / 2000, payload * 8 / 2000, len(data) * 8 / 2000
    assert coded < plain
    assert f"{plain:.3f} kbps without entropy coding" in told
    assert f"{coded:.3f} kbps entropy-coded by the prior {header.prior}" in told
    assert f"{whole:.3f} kbps with the header" in told
    assert "2.000 s at 48000 Hz, 1 channel(s)" in told
    assert f"{plain:.3f} kbps, entropy-coded {coded:.3f} ({whole:.3f} with its header)" in encoded
    assert spresso("info", tmp_path / "x.spr") == 0
    assert "not found under runs/" in capsys.readouterr().out
    spresso("encode", tmp_path / "in.wav", tmp_path / "x.spr", "--codec", codec, "--no-entropy-coding")
    capsys.readouterr()
    spresso("info", tmp_path / "x.spr")
    assert "not entropy-coded" in capsys.readouterr().out


def test_a_stream_of_another_prior_is_refused(codec, tmp_path, capsys):
    soundfile.write(tmp_path / "in.wav", sound(2.0), 48_000)
    spresso("encode", tmp_path / "in.wav", tmp_path / "x.spr", "--codec", codec)
    other = SPresso.from_pretrained(codec)
    other.prior.bias.data += torch.arange(16.0)
    other.save_pretrained(tmp_path / "other", base=codec / "dit.safetensors", card="")
    assert spresso("decode", tmp_path / "x.spr", tmp_path / "y.wav", "--codec", tmp_path / "other") == 2
    assert "entropy-coded with prior" in capsys.readouterr().err
    assert not (tmp_path / "y.wav").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("encode", "sounds", "file.txt"), "is a file, but sounds is a folder"),
        (("encode", "empty", "out"), "holds no sound"),
        (("decode", "empty", "out"), "holds no stream"),
        (("encode", "sounds/mono.wav", "x.spr", "--books", 9), "books"),
        (("encode", "sounds/mono.wav", "x.spr", "--channels", "mid_side"), "needs a sound of 2 channels"),
    ],
)
def test_what_cannot_be(codec, sounds, tmp_path, monkeypatch, capsys, arguments, word):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("")
    Path("empty").mkdir()
    assert spresso(*arguments, "--codec", codec) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert word in told


def test_a_sound_that_cannot_be_written_so_is_an_error_and_leaves_nothing(codec, sounds, tmp_path, capsys):
    spresso("encode", sounds / "mono.wav", tmp_path / "x.spr", "--codec", codec)
    for name, more in (("y.ogg", ("--rate", 768_000)), ("y.flac", ("--rate", 199_999)), ("y.xyz", ())):
        assert spresso("decode", tmp_path / "x.spr", tmp_path / name, "--codec", codec, *more) == 2
        assert name in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / name).exists()
    assert not list(tmp_path.glob(".*partial"))


def test_an_error_per_bit_needs_entropy_coding(codec, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", sound(0.5), 48_000)
    arguments = ("--error-per-bit", "3", "--no-entropy-coding")
    assert spresso("encode", tmp_path / "a.wav", tmp_path / "a.spr", "--codec", codec, *arguments) == 2
    assert "leave --no-entropy-coding out" in capsys.readouterr().err
    assert not (tmp_path / "a.spr").exists()


def test_an_error_per_bit_reaches_the_search_of_codes(codec, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", sound(2.0), 48_000, subtype="FLOAT")
    audio = torch.from_numpy(sound(2.0).T).float()
    itself, payloads = SPresso.from_pretrained(codec), []
    for weight in (0, 100, 1000):
        arguments = ("--codec", codec, "--error-per-bit", weight)
        assert spresso("encode", tmp_path / "a.wav", tmp_path / "a.spr", *arguments) == 0
        data = (tmp_path / "a.spr").read_bytes()
        found = bitstream.read(data, frames_of=itself.z_frames, coder=itself.coder())
        assert np.array_equal(found.codes, itself.encode(audio, error_per_bit=weight).codes)
        payloads.append(bitstream.read_header(data)[1])
    assert payloads[0] > payloads[1] > payloads[2]
