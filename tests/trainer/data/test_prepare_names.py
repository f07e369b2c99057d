"""`prepare` on folders with odd names, with files that are no sounds, and with songs in parts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import soundfile

from launch.cli import main
from tests.trainer.data.test_prepare import (
    FakeAE,
    Interrupted,
    all_metadata,
    contents,
    interrupt_at,
    noise,
    run,
    write_sounds,
)
from trainer.data import prepare as preparing
from trainer.data.shard_plan import sources_fingerprint
from trainer.data.shard_set import ShardSet
from trainer.data.sources_before import list_sources_as_before

PLAIN = {f"plain{letter}.wav": 1.2 for letter in "abcdefghijkl"}


def test_names_that_are_not_utf8_are_used(tmp_path):
    audio = write_sounds(tmp_path / "audio", PLAIN)
    for name in (b"caf\xe9.wav", b"T\xfcr-\xff/x.wav", b"\x81\x82\n.wav"):
        path = Path(os.fsdecode(os.fsencode(audio) + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        shutil.copy(audio / "plaina.wav", path)
    Path(os.fsdecode(os.fsencode(audio) + b"/empty\xe9.wav")).write_bytes(b"")
    report = run(audio, tmp_path / "out", holdout=0.4, shard_mb=0.01, workers=2)
    assert report.files == len(PLAIN) + 4
    assert report.problems == [{"file": "empty\\xe9.wav", "reason": "can't be read as sound: the file is empty"}]
    sources = {metadata["source"] for metadata in all_metadata(tmp_path / "out")}
    assert {"caf\\xe9.wav", "T\\xfcr-\\xff/x.wav"} < sources
    for path in (tmp_path / "out").rglob("*.json"):
        json.loads(path.read_bytes().decode("utf-8"))


def test_what_is_passed_over_is_in_the_report_and_said(tmp_path, capsys):
    audio = write_sounds(tmp_path / "audio", dict.fromkeys(PLAIN, 1.0))
    for name in ("cover.jpg", "deep/cover.jpg", ".hidden"):
        (audio / name).parent.mkdir(exist_ok=True)
        (audio / name).touch()
    os.mkfifo(audio / "pipe.wav")
    (audio / "broken.wav").symlink_to("nowhere.wav")
    (audio / "folder.wav").mkdir()
    (audio / "captions.jsonl").write_text('{"file": "gone.wav", "caption": "a\\u001b[31m bell"}')
    command = ["prepare", "tiny", f"data.audio={audio}", f"run_dir={tmp_path / 'run'}", "data.workers=1"]
    assert main([*command, "data.holdout=0.5"]) == 0
    said = capsys.readouterr().err
    assert "passed over: .jpg (2), folders that are named like a file (1), hidden (1), see " in said
    assert "captions that name no sound (1), such as gone.wav (a\\x1b[31m bell)" in said
    report = json.loads((tmp_path / "run/latents/report.json").read_text())
    assert report["passed_over"][".jpg"] == {"count": 2, "names": ["cover.jpg", "deep/cover.jpg"]}
    assert report["passed_over"]["folders that are named like a file"]["names"] == ["folder.wav"]
    assert report["captions"]["captions that name no sound"]["count"] == 1
    assert {problem["file"]: problem["reason"] for problem in report["problems"]} == {
        "broken.wav": "is a link to nowhere.wav, which is missing",
        "pipe.wav": "is a pipe, not a file",
    }


def test_what_a_run_wrote_is_not_learned_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sounds(Path(), dict.fromkeys(PLAIN, 1.0))
    command = ["prepare", "tiny", "data.audio=.", "data.workers=1", "data.holdout=0.5"]
    assert main([*command, "name=first"]) == 0
    write_sounds(Path("runs/first/page/audio"), {"decoded.wav": 1.0})
    assert main([*command, "name=first"]) == 0
    for more in ("name=second", "run_dir=."):
        assert main([*command, more]) == 0
    for out in ("runs/second", "."):
        report = json.loads((Path(out) / "latents/report.json").read_text())
        assert report["files"] == len(PLAIN)
        assert report["passed_over"]["directories of runs"]["names"][0] == "runs/first"


def test_the_parts_of_a_song_are_on_one_side(tmp_path):
    parts = ("mixture", "vocals", "drums", "bass", "other")
    audio = write_sounds(tmp_path / "audio", {f"song_{n:02d}/{part}.wav": 0.5 for n in range(12) for part in parts})
    report = run(audio, tmp_path / "out", holdout=0.3)
    train, test = (songs(tmp_path / "out" / split) for split in ("train", "test"))
    assert not train & test
    assert len(train | test) == 12
    assert sum(report.clips.values()) == 60


def songs(folder: Path) -> set[str]:
    shards = ShardSet(folder)
    return {Path(shards.metadata(id_)["source"]).parent.name for id_ in range(len(shards))}


def test_an_attempt_that_divided_the_files_otherwise_begins_again(tmp_path, monkeypatch):
    audio = write_sounds(tmp_path / "audio", {f"song_{n:02d}/{part}.wav": 0.5 for n in range(9) for part in "ab"})
    out = tmp_path / "out"
    with monkeypatch.context() as before:
        before.setattr("trainer.data.shard_plan.groups", lambda places: [name for _, name in places])
        before.setattr(preparing, "_division", lambda sources: {})
        with pytest.raises(Interrupted):
            run(audio, out, shard_mb=0.01, progress=interrupt_at(12))
    assert (out / ".prepare").exists()
    run(audio, out, shard_mb=0.01)
    run(audio, tmp_path / "whole", shard_mb=0.01)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_set_of_release_0_1_0_is_finished(tmp_path):
    """It passed over linked folders and suffixes that are sounds now."""
    audio = write_sounds(tmp_path / "audio", PLAIN)
    write_sounds(tmp_path / "disk", {"x.wav": 0.6})
    first = run(audio, tmp_path / "out")
    (audio / "linked").symlink_to(tmp_path / "disk")
    soundfile.write(audio / "more.au", noise("more", 0.6), FakeAE.sample_rate)
    assert sources_fingerprint(list_sources_as_before(audio)) == first.settings["files"]
    before = contents(tmp_path / "out")
    assert run(audio, tmp_path / "out") == first
    assert contents(tmp_path / "out") == before
    assert run(audio, tmp_path / "other").files == len(PLAIN) + 2


def test_a_report_of_release_0_1_0_is_read(tmp_path):
    audio = write_sounds(tmp_path / "audio", PLAIN)
    run(audio, tmp_path / "out")
    path = tmp_path / "out/report.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in report.items() if key not in ("passed_over", "captions")}))
    assert run(audio, tmp_path / "out").files == len(PLAIN)


def test_captions_with_half_a_character_are_written(tmp_path):
    audio = write_sounds(tmp_path / "audio", PLAIN)
    lines = [{"file": name, "caption": "half a \ud83d", "note": "\ud83d"} for name in PLAIN]
    (audio / "m.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    run(audio / "m.jsonl", tmp_path / "out")
    assert {entry["caption"] for entry in all_metadata(tmp_path / "out")} == {"half a \\ud83d"}
