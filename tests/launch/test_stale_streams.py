"""`spresso encode` of a folder knows by its record whether a stream is of the sound that is there now."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import soundfile

from launch import file_encoder
from launch.encode_record import RECORD
from models import bitstream
from tests.launch.codecs import export_codec, sound, spresso
from trainer.files import file_digest

PAST, FUTURE = 1_000_000_000, 4_000_000_000  # dates in s


@pytest.fixture
def encode(codec, tmp_path, monkeypatch, capsys):
    """Encodes `sounds`, which holds a.wav and b.wav of 0.1 s, to `streams`; returns the counts done and passed over."""
    monkeypatch.chdir(tmp_path)
    Path("sounds").mkdir()
    for number, name in enumerate("ab"):
        soundfile.write(f"sounds/{name}.wav", sound(0.1, seed=number), 48_000)

    def run(*options: object, codec: Path = codec) -> tuple[int, int]:
        assert spresso("encode", "sounds", "streams", "--codec", codec, *options) == 0
        report = json.loads(Path("streams/encode.report.json").read_text())
        assert report["finished"]
        assert report["failed"] == 0
        return report["done"], report["already_there"]

    assert run() == (2, 0)
    assert run() == (0, 2)
    return run


def samples(stream: str) -> int:
    return bitstream.read_header(Path(stream).read_bytes())[0].samples


@pytest.mark.parametrize("date", [PAST, FUTURE, None])
def test_a_sound_that_was_moved_over_another_is_encoded(encode, date):
    """Whatever its date is; None: that of the sound which it replaces."""
    soundfile.write("new.wav", sound(0.2, seed=5), 48_000)
    shutil.copystat("sounds/a.wav", "new.wav")
    if date is not None:
        os.utime("new.wav", (date, date))
    Path("new.wav").rename("sounds/a.wav")
    assert encode() == (1, 1)
    assert samples("streams/a.wav.spr") == 9600
    assert encode() == (0, 2)


def test_another_error_per_bit_encodes_all_anew(encode):
    before = {path.name: path.read_bytes() for path in Path("streams").glob("*.spr")}
    assert encode("--error-per-bit", 100) == (2, 0)
    assert encode("--error-per-bit", 100) == (0, 2)
    assert {path.name: path.read_bytes() for path in Path("streams").glob("*.spr")} != before
    assert encode("--error-per-bit", 50) == (2, 0)
    assert encode() == (2, 0)
    assert {path.name: path.read_bytes() for path in Path("streams").glob("*.spr")} == before


def test_a_sound_of_the_same_size_and_date_is_told_by_its_content(encode):
    before = Path("streams/a.wav.spr").read_bytes()
    soundfile.write("new.wav", sound(0.1, seed=9), 48_000)
    shutil.copystat("sounds/a.wav", "new.wav")
    assert Path("new.wav").stat().st_size == Path("sounds/a.wav").stat().st_size
    Path("new.wav").rename("sounds/a.wav")
    assert encode() == (1, 1)
    assert Path("streams/a.wav.spr").read_bytes() != before


@pytest.mark.parametrize("date", [PAST, FUTURE])
def test_a_copy_or_a_new_date_is_no_change_and_is_read_once(encode, date, monkeypatch):
    shutil.copy("sounds/a.wav", "copy.wav")
    os.utime("copy.wav", (date, date))
    Path("copy.wav").rename("sounds/a.wav")
    assert encode() == (0, 2)
    monkeypatch.setattr("launch.encode_record.file_digest", lambda path: pytest.fail(f"{path} was read again"))
    assert encode() == (0, 2)


def test_other_settings_encode_again(encode, tmp_path):
    soundfile.write("sounds/b.wav", sound(0.1, 2), 48_000)
    assert encode() == (1, 1)
    for options in (("--books", 2), ("--channels", "separate"), ("--no-entropy-coding",)):
        assert encode(*options) == (2, 0)
        assert encode(*options) == (0, 2)
    (tmp_path / "other").mkdir()
    other = export_codec(tmp_path / "other", seed=2)
    assert encode(codec=other) == (2, 0)
    assert encode(codec=other) == (0, 2)


def test_a_stream_that_was_replaced_or_damaged_is_made_again(encode):
    good = Path("streams/a.wav.spr").read_bytes()
    Path("streams/a.wav.spr").write_bytes(good[:-1])
    assert encode() == (1, 1)
    Path("streams/a.wav.spr").write_bytes(Path("streams/b.wav.spr").read_bytes())
    assert encode() == (1, 1)
    assert Path("streams/a.wav.spr").read_bytes() == good


def test_streams_without_a_record_are_judged_by_date_and_length(encode, codec):
    """As those of an older version are."""
    Path("streams", RECORD).unlink()
    soundfile.write("new.wav", sound(0.2), 48_000)
    os.utime("new.wav", (PAST, PAST))
    Path("new.wav").rename("sounds/a.wav")
    os.utime("streams/a.wav.spr")
    os.utime("streams/b.wav.spr")
    assert encode() == (1, 1)
    assert samples("streams/a.wav.spr") == 9600
    assert encode() == (0, 2)
    Path("streams", RECORD).unlink()
    os.utime("streams/b.wav.spr", (PAST, PAST))
    os.utime("streams/a.wav.spr")
    assert encode() == (1, 1)


def test_streams_without_a_record_have_to_fit_the_settings(encode):
    soundfile.write("sounds/b.wav", sound(0.1, 2), 48_000)
    assert encode() == (1, 1)
    Path("streams", RECORD).unlink()
    for name in "ab":
        os.utime(f"streams/{name}.wav.spr")
    assert encode("--channels", "separate") == (1, 1)  # mono has one layout
    Path("streams", RECORD).unlink()
    assert encode("--books", 2) == (2, 0)


def test_a_record_that_was_cut_is_continued(encode):
    record = Path("streams", RECORD)
    record.write_bytes(record.read_bytes()[:-20])
    os.utime("streams/b.wav.spr", (PAST, PAST))
    assert encode() == (1, 1)
    assert encode() == (0, 2)
    assert [json.loads(line)["stream"] for line in record.read_text().splitlines() if line.endswith("}")] == [
        "a.wav.spr",
        "b.wav.spr",
    ]


def test_a_sound_that_changes_while_it_is_read_fails(encode, codec, monkeypatch, capsys):
    def digest(path: Path) -> str:
        os.utime(path)
        return file_digest(path)

    monkeypatch.setattr(file_encoder, "file_digest", digest)
    assert spresso("encode", "sounds", "streams", "--force", "--codec", codec) == 1
    assert "a.wav was changed while it was read" in capsys.readouterr().err
    assert samples("streams/a.wav.spr") == 4800
