"""A job that is cut into parts, and sounds that a manifest names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main
from tests.trainer.data.older_sets import without_checksums
from tests.trainer.data.test_prepare import (
    REPOSITORY,
    Interrupted,
    all_metadata,
    contents,
    interrupt_at,
    run,
    write_sounds,
)
from trainer.data.sources import list_sources


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    return write_sounds(tmp_path / "audio", {f"{n % 3}/sound{n:02d}.wav": 0.2 + 0.13 * (n % 9) for n in range(20)})


# ---- parts


@pytest.mark.parametrize("parts", [2, 3, 40])
def test_parts_of_a_job_make_the_same_sets(sounds, tmp_path, parts):
    whole = run(sounds, tmp_path / "whole", shard_mb=0.03)
    out = tmp_path / "out"
    reports = [run(sounds, out, shard_mb=0.03, part=part, parts=parts) for part in reversed(range(parts))]
    assert reports[:-1] == [None] * (parts - 1)
    assert reports[-1] == whole
    assert contents(out) == contents(tmp_path / "whole")
    assert run(sounds, out, shard_mb=0.03, part=0, parts=parts) == whole


def test_a_part_that_was_interrupted_makes_only_what_is_missing(sounds, tmp_path):
    run(sounds, tmp_path / "whole", shard_mb=0.03)
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(sounds, out, shard_mb=0.03, part=0, parts=2, progress=interrupt_at(7))
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert run(sounds, out, shard_mb=0.03, part=1, parts=2) is None
    steps: list[int] = []
    assert run(sounds, out, shard_mb=0.03, part=0, parts=2, progress=lambda tally: steps.append(tally.done))
    assert steps[0] > 1
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert contents(out) == contents(tmp_path / "whole")


def test_what_an_older_version_began_is_finished(sounds, tmp_path):
    """The rows of its finished shards have no checksums of metadata; the sets are the same all the same."""
    run(sounds, tmp_path / "whole", shard_mb=0.03)
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(sounds, out, shard_mb=0.03, progress=interrupt_at(13))
    rows = sorted((out / ".prepare").glob("*.npy"))
    for path in rows:
        np.save(path, without_checksums(np.load(path)))
    assert rows
    run(sounds, out, shard_mb=0.03)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", None])
def test_rows_of_a_shard_that_are_damaged_are_named(sounds, tmp_path, content):
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(sounds, out, shard_mb=0.03, progress=interrupt_at(13))
    path = min((out / ".prepare").glob("*.npy"))
    if content is None:
        np.save(path, np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged .*: remove \S+\.json, and the shard is made again"):
        run(sounds, out, shard_mb=0.03)
    (out / ".prepare" / f"{path.name.removesuffix('-00000.tar.npy')}.json").unlink()
    assert run(sounds, out, shard_mb=0.03)


def test_parts_at_the_same_time(sounds, tmp_path):
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.trainer.data.test_prepare import run\n"
        "run(Path(sys.argv[1]), Path(sys.argv[2]), shard_mb=0.03, part=int(sys.argv[3]), parts=4)\n"
    )
    run(sounds, tmp_path / "whole", shard_mb=0.03)
    command = [sys.executable, "-c", program, str(sounds), str(tmp_path / "out")]
    processes = [subprocess.Popen([*command, str(part)], cwd=REPOSITORY) for part in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_parts_by_the_command(tmp_path, capsys):
    write_sounds(tmp_path / "audio", {f"{name}.wav": 1.0 for name in "abcdefgh"})
    command = ["prepare", "tiny", f"data.audio={tmp_path / 'audio'}", f"run_dir={tmp_path / 'run'}", "data.workers=1"]
    command += ["data.shard_mb=0.05", "data.holdout=0.5", "--part"]
    assert main([*command, "0/2"]) == 0
    assert "part 0 of 2 is done" in capsys.readouterr().err
    assert main([*command, "1/2"]) == 0
    assert "8 files" in capsys.readouterr().err
    for wrong in ("2/2", "1", "a/b", "-1/2"):
        assert main([*command[:-1], f"--part={wrong}"]) == 2
        assert "is not K/N with K from 0 to N-1, such as 0/8" in capsys.readouterr().err


# ---- manifests


JSONL = """{"file": "0/sound00.wav", "caption": " a  knock ", "license": "CC0", "tags": ["wood"]}

{"file": "2/sound02.wav"}
{"file": "gone.wav", "caption": "nothing"}
{"file": "1/sound01.wav", "caption": "a bell"}
"""
CSV = (
    'caption,file,license\n a  knock ,0/sound00.wav,CC0\n,2/sound02.wav,\nnothing,gone.wav,\n"a bell",1/sound01.wav,\n'
)


@pytest.mark.parametrize(("name", "text"), [("sounds.jsonl", JSONL), ("sounds.csv", CSV)])
def test_a_manifest_names_sounds_and_captions(sounds, tmp_path, name, text):
    (sounds / name).write_text(text)
    report = run(sounds / name, tmp_path / "out", holdout=0)
    assert report.files == 4
    assert [problem["file"] for problem in report.problems] == ["gone.wav"]
    about = {metadata["source"]: metadata for metadata in all_metadata(tmp_path / "out")}
    captions = {source: metadata["caption"] for source, metadata in about.items()}
    assert captions == {"0/sound00.wav": "a knock", "1/sound01.wav": "a bell", "2/sound02.wav": "sound"}
    assert about["0/sound00.wav"]["facts"]["license"] == "CC0"
    if name.endswith(".jsonl"):
        assert about["0/sound00.wav"]["facts"]["tags"] == ["wood"]
        assert "facts" not in about["1/sound01.wav"]


def test_a_manifest_may_lie_anywhere(sounds, tmp_path):
    (tmp_path / "lists").mkdir()
    manifest = tmp_path / "lists/some.jsonl"
    manifest.write_text("\n".join(json.dumps({"file": str(path)}) for path in sorted(sounds.rglob("*.wav"))))
    assert run(manifest, tmp_path / "out").files == 20
    assert {source.path for source in list_sources(manifest)} == set(sounds.rglob("*.wav"))


def test_another_caption_is_another_set(sounds, tmp_path):
    manifest = sounds / "some.jsonl"
    manifest.write_text('{"file": "0/sound00.wav", "caption": "one"}')
    run(manifest, tmp_path / "out", holdout=0)
    manifest.write_text('{"file": "0/sound00.wav", "caption": "two"}')
    with pytest.raises(ValueError, match=r"other settings \(files\)"):
        run(manifest, tmp_path / "out", holdout=0)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.jsonl", '{"caption": "x"}', "line 1 names no file"),
    ("a.jsonl", '{"file": "a.wav"}\n{"file": "a.wav"}', "line 2 names a.wav again"),
    ("a.jsonl", "{", "line 1 is not JSON"),
    ("a.jsonl", "\n", "names no file"),
    ("a.csv", "path,caption\na.wav,x\n", "line 2 names no file"),
    ("a.csv", "file\n", "names no file"),
    ("b.csv", None, "is missing"),
])  # fmt: skip
def test_a_wrong_manifest_is_explained(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list_sources(tmp_path / name)
