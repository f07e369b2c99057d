"""Tars and tables give the sets that a folder of the same sounds gives, and their damage is named."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from launch.cli import main
from tests.trainer.data.sound_sources import (
    AUDIO,
    SOURCES,
    as_tars,
    members_of,
    rows_of,
    save_to_disk,
    table_of,
    write_arrow,
    write_parquet,
    write_tar,
)
from tests.trainer.data.test_prepare import (
    REPOSITORY,
    Interrupted,
    all_metadata,
    interrupt_at,
    noise,
    run,
    write_sounds,
)
from trainer.data import tables
from trainer.data.bucket import SourceError
from trainer.data.locate import Asked
from trainer.data.mixed_sources import open_sources

COUNT = 20


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Some sounds with captions."""
    folder = write_sounds(tmp_path / "audio", {f"sound{n:02d}.wav": 0.2 + 0.13 * (n % 9) for n in range(COUNT)})
    for number in range(0, COUNT, 2):
        (folder / f"sound{number:02d}.txt").write_text(f"noise of kind {number}")
    return folder


def made(out: Path) -> dict[str, bytes]:
    """All shards and indices of the two sets."""
    paths = [*out.glob("*/*.tar"), *out.glob("*/index.npy")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def problems_of(out: Path) -> dict[str, str]:
    return {problem["file"]: problem["reason"] for problem in report_of(out)["problems"]}


# ---- the same sets


@pytest.mark.parametrize("kind", SOURCES)
def test_the_sets_are_those_of_the_folder(sounds, tmp_path, kind):
    run(sounds, tmp_path / "whole", shard_mb=0.03)
    source = SOURCES[kind](sounds, tmp_path / "other")
    report = run(source, tmp_path / "out", shard_mb=0.03)
    assert len(made(tmp_path / "out")) > 5
    assert made(tmp_path / "out") == made(tmp_path / "whole")
    assert report.problems == []
    assert report.content["files"] == report_of(tmp_path / "whole")["content"]["files"]
    assert [path.name for path in (tmp_path / "out").glob(".prepare*")] == [".prepare.lock"]
    assert run(source, tmp_path / "out", shard_mb=0.03) == report


@pytest.mark.parametrize(("kind", "workers"), [("tar", 2), ("parquet", 2), ("parquet", 3), ("stream", 3)])
def test_the_number_of_workers_changes_nothing(sounds, tmp_path, kind, workers):
    run(sounds, tmp_path / "whole", shard_mb=0.03)
    run(SOURCES[kind](sounds, tmp_path / "other"), tmp_path / "out", shard_mb=0.03, workers=workers)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["folder of tars", "folder of parquet"])
@pytest.mark.parametrize("parts", [2, 5])
def test_parts_make_the_same_sets_and_list_once(sounds, tmp_path, monkeypatch, kind, parts):
    run(sounds, tmp_path / "whole", shard_mb=0.03)
    source = SOURCES[kind](sounds, tmp_path / "other")
    reports = [run(source, tmp_path / "out", shard_mb=0.03, part=0, parts=parts)]
    for name in ("tar_members", "table_sounds"):
        monkeypatch.setattr(f"trainer.data.list_places.{name}", lambda *_, **__: pytest.fail("it is listed again"))
    reports += [run(source, tmp_path / "out", shard_mb=0.03, part=part, parts=parts) for part in range(1, parts)]
    assert reports[:-1] == [None] * (parts - 1)
    assert reports[-1] is not None
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_a_part_reads_only_the_row_groups_of_its_sounds(sounds, tmp_path, monkeypatch):
    """Neither group is read to skip to another one, and each group is read once for a set."""
    source = write_parquet(tmp_path / "a.parquet", table_of(rows_of(sounds)), rows=5)
    options: dict[str, Any] = {"shard_mb": 0.03, "holdout": 0, "parts": 4}
    run(source, tmp_path / "out", part=0, **options)
    groups: list[int] = []
    real = tables.ParquetRows.batches

    def batches(self, group, columns, size):
        groups.append(group)
        return real(self, group, columns, size)

    monkeypatch.setattr(tables.ParquetRows, "batches", batches)
    for part in range(1, 4):
        run(source, tmp_path / "out", part=part, **options)
    assert len(groups) < 4 * 3
    assert set(groups) <= {0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["tar", "parquet", "file"])
def test_what_was_interrupted_goes_on(sounds, tmp_path, kind):
    run(sounds, tmp_path / "whole", shard_mb=0.03)
    source, out = SOURCES[kind](sounds, tmp_path / "other"), tmp_path / "out"
    for file in (4, 13):
        with pytest.raises(Interrupted):
            run(source, out, shard_mb=0.03, progress=interrupt_at(file))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert before
    steps: list[int] = []
    run(source, out, shard_mb=0.03, progress=lambda tally: steps.append(tally.done))
    assert steps[0] > 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert made(out) == made(tmp_path / "whole")


def test_killed_and_run_again(sounds, tmp_path):
    source, out = SOURCES["parquet"](sounds, tmp_path / "other"), tmp_path / "out"
    program = (
        "import os, sys\nfrom tests.trainer.data.test_prepare import run\n"
        "run(sys.argv[1], __import__('pathlib').Path(sys.argv[2]), shard_mb=0.03, "
        "progress=lambda tally: tally.done == 11 and os.kill(os.getpid(), 9))\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(source), str(out)], cwd=REPOSITORY, check=False)
    assert killed.returncode == -9
    run(source, out, shard_mb=0.03)
    run(sounds, tmp_path / "whole", shard_mb=0.03)
    assert made(out) == made(tmp_path / "whole")


def test_several_places_are_one_set(sounds, tmp_path):
    """A folder, a tar and a table; what has the same name in two of them keeps both."""
    write_tar(tmp_path / "more.tar", [("sound00.wav", (sounds / "sound01.wav").read_bytes())])
    write_parquet(tmp_path / "more.parquet", table_of(rows_of(sounds)[:2]))
    report = run(f"{{{sounds},{tmp_path}/more.tar,{tmp_path}/more.parquet}}", tmp_path / "out")
    assert report.files == COUNT + 3
    names = {entry["source"] for entry in all_metadata(tmp_path / "out")}
    assert len(names) == COUNT + 3
    assert {"audio/sound00.wav", "more/sound00.wav", "more-000000/sound00.wav", "sound05.wav"} < names
    keys = {entry["key"].rpartition("-")[0] for entry in all_metadata(tmp_path / "out")}
    assert {"sound00", "sound00-2", "sound00-3"} < keys


def test_sets_are_recognized_by_their_bytes_after_a_copy(sounds, tmp_path):
    source = write_parquet(tmp_path / "a.parquet", table_of(rows_of(sounds)))
    first = run(source, tmp_path / "out")
    os.utime(source)
    assert run(source, tmp_path / "out").content == first.content
    table = table_of([*rows_of(sounds)[1:], rows_of(sounds)[0]])
    write_parquet(source, table.slice(0, COUNT - 1))
    with pytest.raises(ValueError, match=r"\(files\), as \S+a\.parquet has changed: remove it"):
        run(source, tmp_path / "out")


def test_a_changed_source_is_not_mixed_with_what_was_made(sounds, tmp_path):
    source = as_tars(sounds, tmp_path / "other")
    with pytest.raises(Interrupted):
        run(source, tmp_path / "out", shard_mb=0.03, progress=interrupt_at(13))
    write_tar(source / "shard-002.tar", [("new.wav", (sounds / "sound01.wav").read_bytes())])
    write_sounds(sounds, {"new.wav": 0.2})
    (sounds / "new.wav").write_bytes((sounds / "sound01.wav").read_bytes())
    run(source, tmp_path / "out", shard_mb=0.03)
    names = sorted(entry["source"] for entry in all_metadata(tmp_path / "out"))
    assert "new.wav" in names
    write_tar(source / "shard-003.tar", [("newer.wav", b"")])
    with pytest.raises(ValueError, match=r"as \S+shard-003\.tar is new"):
        run(source, tmp_path / "out", shard_mb=0.03)


@pytest.mark.parametrize("kind", ["tar", "parquet", "stream"])
def test_a_source_that_changes_under_the_work_stops_it(sounds, tmp_path, kind):
    source = Path(SOURCES[kind](sounds, tmp_path / "other"))

    def change(tally: Any) -> None:
        if tally.done == 2:
            content = source.read_bytes()
            source.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
            os.utime(source, ns=(1, 1))

    with pytest.raises(SourceError, match=r"has changed or is gone since it was listed: run the same command again"):
        run(source, tmp_path / "out", shard_mb=0.03, progress=change)
    assert not (tmp_path / "out/report.json").exists()


# ---- tars


def test_the_conventions_of_webdataset(tmp_path):
    sounds = {name: noise(name, 0.6) for name in "abcd"}
    content = {}
    for name, samples in sounds.items():
        soundfile.write(tmp_path / f"{name}.flac", samples, 8000)
        content[name] = (tmp_path / f"{name}.flac").read_bytes()
    write_tar(tmp_path / "w.tar", [
        ("000.near.flac", content["a"]), ("000.far.FLAC", content["b"]),
        ("000.json", b'{"text": "a door", "__key__": "000", "license": "CC0"}'),
        ("sub/001.flac", content["c"]), ("sub/001.txt", b"rain\n"), ("sub/001.cls", b"7"),
        ("002.flac", content["d"]), ("002.json", b"{"), (".hidden.flac", b"x"), ("../../up.flac", content["a"]),
    ])  # fmt: skip
    report = run(tmp_path / "w.tar", tmp_path / "out", holdout=0)
    about = {entry["source"]: entry for entry in all_metadata(tmp_path / "out")}
    assert {name: entry["caption"] for name, entry in about.items()} == {
        "000.near.flac": "a door", "000.far.FLAC": "a door", "sub/001.flac": "rain", "002.flac": "002", "up.flac": "up",
    }  # fmt: skip
    assert about["000.far.FLAC"]["facts"] == {"license": "CC0"}
    assert set(report.passed_over) == {".cls", "hidden"}
    assert report.captions["files of captions that can't be read"]["names"] == [f"{tmp_path}/w.tar 002.json"]


def test_bad_members_are_named_and_the_others_go_on(sounds, tmp_path):
    good = [(f"g{n}.wav", (sounds / f"sound{n:02d}.wav").read_bytes()) for n in range(5)]
    path = write_tar(tmp_path / "a.tar", [*good, ("text.wav", b"no sound"), ("empty.wav", b"")])
    with tarfile.open(path, "a") as tar:
        for name, target in (("link.wav", "g0.wav"), ("out.wav", "/etc/passwd"), ("up.wav", "../../secret.wav")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
        member = tarfile.TarInfo("pipe.wav")
        member.type = tarfile.FIFOTYPE
        tar.addfile(member)
    run(path, tmp_path / "out", holdout=0)
    assert problems_of(tmp_path / "out") == {
        f"{path} member text.wav": "can't be read as sound: Format not recognised",
        f"{path} member empty.wav": "can't be read as sound: the file is empty",
        f"{path} member out.wav": "is a link to /etc/passwd, which the tar does not hold",
        f"{path} member up.wav": "is a link to ../../secret.wav, which the tar does not hold",
        f"{path} member pipe.wav": "is a pipe or a device",
    }
    assert {entry["source"] for entry in all_metadata(tmp_path / "out")} == {
        *(f"g{n}.wav" for n in range(5)),
        "link.wav",
    }


@pytest.mark.parametrize(("damage", "said"), [
    (lambda content: content[: -(-len(content.rstrip(b"\0")) // 512) * 512], "end-of-archive marker is missing"),
    (lambda content: content[:30_000], "is not a whole tar file: .* but its header says"),
    (lambda content: content[:1536] + b"\xff" * 8 + content[1544:], ""),
    (lambda content: content[:600] + content[700:], "is not a whole tar file"),
    (lambda content: b"\x1f\x8b" + content[2:], "is compressed, which rules out random access: unpack it"),
    (lambda content: content + content, "consists of several tars"),
    (lambda content: b"no tar" * 500, "is not a whole tar file: the header at byte 0 is damaged"),
])  # fmt: skip
def test_damaged_tars_are_refused(sounds, tmp_path, damage, said):
    path = write_tar(tmp_path / "a.tar", members_of(sounds))
    path.write_bytes(damage(path.read_bytes()))
    if not said:  # a damaged sound is not a damaged tar
        assert list(problems_of_run(path, tmp_path / "out")) == [f"{path} member sound00.wav"]
        return
    with pytest.raises(ValueError, match=said):
        run(path, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/*.tar"))


def problems_of_run(source: Path, out: Path) -> dict[str, str]:
    run(source, out)
    return problems_of(out)


def test_a_tar_with_two_members_of_a_name_is_refused(sounds, tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.wav", b"x"), ("./a.wav", b"y")])
    with pytest.raises(ValueError, match=r"a\.tar holds two members a\.wav: unpack the tar"):
        run(path, tmp_path / "out")


# ---- tables


def test_bad_rows_are_named_and_the_others_go_on(sounds, tmp_path):
    rows = rows_of(sounds)[:6]
    rows[1]["audio"] = None
    rows[2]["audio"] = {"bytes": b"no sound", "path": "bad.wav"}
    rows[3]["audio"] = {"bytes": None, "path": "gone.wav"}
    rows[4]["audio"] = {"bytes": None, "path": "../audio/sound04.wav"}
    rows += [{"audio": {"bytes": None, "path": path}, "text": None} for path in ("s3://bucket/a.wav", None)]
    rows.append({"audio": {"bytes": rows[0]["audio"]["bytes"], "path": None}, "text": None})
    rows.append({"audio": {"bytes": rows[5]["audio"]["bytes"], "path": "/home/else/named.wav"}, "text": None})
    for path in (
        write_parquet(tmp_path / "x.parquet", table_of(rows)),
        write_arrow(tmp_path / "x.arrow", table_of(rows)),
    ):
        out = tmp_path / path.suffix[1:]
        run(path, out)
        assert problems_of(out) == {
            f"{path} row 1": "has neither bytes nor a path",
            f"{path} row 2": "can't be read as sound: Format not recognised",
            f"{path} row 3": f"names a file that can't be read: {tmp_path}/gone.wav is missing",
            f"{path} row 4": "names ../audio/sound04.wav, which lies outside of the table's folder",
            f"{path} row 6": "names s3://bucket/a.wav in place of the sound's bytes, which have to be in the table",
            f"{path} row 7": "has neither bytes nor a path",
        }
        found = {entry["source"]: entry["caption"] for entry in all_metadata(out)}
        assert found == {
            "sound00.wav": "noise of kind 0", "sound05.wav": "sound", "x-000008": "sound", "named.wav": "named",
        }  # fmt: skip


def test_columns_of_sounds_and_captions(sounds, tmp_path):
    rows = [
        {"near": row["audio"], "far": row["audio"], "text": "the text", "label": "the label", "loud": 3, "tags": ["a"]}
        for row in rows_of(sounds)[:4]
    ]
    types = {"near": AUDIO, "far": AUDIO, "label": pa.string(), "loud": pa.int64(), "tags": pa.list_(pa.string())}
    table = table_of(rows, **types).drop_columns(["audio"])
    path = write_parquet(tmp_path / "a.parquet", table)
    with pytest.raises(
        ValueError, match=r"several columns of sounds \(near, far\): set data.audio_column to one of near, far"
    ):
        run(path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no column middle: set data\.audio_column to one of"):
        run(path, tmp_path / "out", audio_column="middle")
    with pytest.raises(ValueError, match="the column loud holds int64, neither files of sound nor their paths"):
        run(path, tmp_path / "out", audio_column="loud")
    run(path, tmp_path / "out", audio_column="far", caption_column="label", holdout=0)
    entry = all_metadata(tmp_path / "out")[0]
    assert (entry["caption"], entry["facts"]) == ("the label", {"text": "the text", "loud": 3})
    with pytest.raises(ValueError, match=r"has no column of sounds: set data.audio_column to one of text"):
        run(write_parquet(tmp_path / "b.parquet", table.select(["text"])), tmp_path / "other")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("at", [0.0, 0.02, 0.5, 0.9, 0.995])
def test_cut_tables_are_refused(sounds, tmp_path, suffix, at):
    write = write_parquet if suffix == ".parquet" else write_arrow
    path = write(tmp_path / f"a{suffix}", table_of(rows_of(sounds)))
    content = path.read_bytes()
    path.write_bytes(content[: int(at * len(content))])
    with pytest.raises(ValueError, match=rf"a{suffix} is (damaged|cut off)"):
        run(path, tmp_path / "out")


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_that_lacks_its_last_batches_is_refused(sounds, tmp_path, stream):
    """Cut between two batches, so that all that is there can be read."""
    table = table_of(rows_of(sounds))
    path = write_arrow(tmp_path / "a.arrow", table, stream=stream)
    shorter = write_arrow(tmp_path / "b.arrow", table.slice(0, 9), stream=stream).stat().st_size
    if stream:
        path.write_bytes(path.read_bytes()[: shorter - 8])
    else:
        path.write_bytes(path.read_bytes()[: shorter - 600])
    with pytest.raises(ValueError, match=r"a\.arrow is (cut off|damaged)"):
        run(path, tmp_path / "out")


def _absurd_footer(content: bytes) -> bytes:
    return content[:-8] + struct.pack("<I", 0x7FFFFFFF) + b"PAR1"


def _absurd_message(content: bytes) -> bytes:
    return content[:4] + struct.pack("<i", 0x7FFFFFF0) + content[8:]


@pytest.mark.parametrize(("suffix", "damage"), [
    (".parquet", _absurd_footer), (".parquet", lambda content: b"PAR0" + content[4:-4] + b"PAR0"),
    (".parquet", lambda content: b"RIFF" * 100), (".arrow", _absurd_message), (".arrow", lambda content: b"RIFF" * 100),
    (".arrow", lambda content: b"ARROW1" + content[6:]), (".arrow", lambda content: b""),
    (".parquet", lambda content: b""),
])  # fmt: skip
def test_tables_of_another_kind_and_absurd_sizes_are_refused_at_a_small_cost(sounds, tmp_path, suffix, damage):
    write = write_parquet if suffix == ".parquet" else write_arrow
    path = write(tmp_path / f"a{suffix}", table_of(rows_of(sounds)))
    path.write_bytes(damage(path.read_bytes()))
    before = pa.total_allocated_bytes()
    with pytest.raises(ValueError, match=rf"a{suffix} is (damaged|cut off)"):
        run(path, tmp_path / "out")
    assert pa.total_allocated_bytes() - before < 64 << 20


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_flipped_bits_never_end_the_process_or_pass_unnoticed(sounds, tmp_path, suffix, seed):
    """A table with damage is refused in a line, or read: bits that fall on sounds are for their decoders to find."""
    write = write_parquet if suffix == ".parquet" else write_arrow
    path = write(tmp_path / f"a{suffix}", table_of(rows_of(sounds)[:4]))
    content, chance = bytearray(path.read_bytes()), np.random.default_rng(seed)
    for at in chance.integers(len(content), size=3):
        content[at] ^= 1 << int(chance.integers(8))
    path.write_bytes(content)
    said = ""
    try:
        cells = tables.Cells(0)
        for source in open_sources(Asked(path)).listed().files:
            cells.loaded(source)
    except (ValueError, SourceError) as error:
        said = str(error)
    assert not said or f"a{suffix}" in said


def test_compressed_arrow_is_refused_with_the_mend(sounds, tmp_path):
    options = {"options": pa.ipc.IpcWriteOptions(compression="lz4")}
    path = write_arrow(tmp_path / "a.arrow", table_of(rows_of(sounds)), **options)
    with pytest.raises(ValueError, match=r"a\.arrow holds compressed batches: write the table as Parquet"):
        run(path, tmp_path / "out")


def test_a_saved_set_that_lacks_a_file_is_refused(sounds, tmp_path):
    folder = save_to_disk(tmp_path / "saved", table_of(rows_of(sounds)))
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match=r"state\.json names data-00001-of-00002\.arrow, which is missing"):
        run(folder, tmp_path / "out")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../../a.arrow"}]}')
    with pytest.raises(ValueError, match=r"state\.json names \.\./\.\./a\.arrow, which is missing"):
        run(folder, tmp_path / "out")


def test_a_large_row_group_does_not_fill_the_memory(tmp_path):
    """240 MiB in a row group of pages of a few rows: Arrow takes at most a fraction of them, and the process too."""
    soundfile.write(tmp_path / "a.wav", noise("a", 1.0), 8000)
    content = (tmp_path / "a.wav").read_bytes()
    rows = [{"audio": {"bytes": content + np.random.default_rng(n).bytes(4 << 20), "path": None}} for n in range(60)]
    write_parquet(tmp_path / "a.parquet", table_of(rows), rows=1000, write_batch_size=2)
    del rows
    program = (
        "import resource, sys, pyarrow\nfrom pathlib import Path\nfrom tests.trainer.data.test_prepare import run\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(pyarrow.default_memory_pool().max_memory() >> 20, (after - before) >> 10)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.parquet"), str(tmp_path / "out")]
    told = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    arrow, grown = map(int, told.split())
    assert arrow < 80
    assert grown < 180


def test_pyarrow_is_asked_for_by_its_name(sounds, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", table_of(rows_of(sounds)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"need pyarrow .*: pip install 'spresso\[datasets\]', or pip install pyarrow"):
        run(path, tmp_path / "out")


def test_splits_that_the_files_name_are_told(sounds, tmp_path):
    table = table_of(rows_of(sounds))
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", table.slice(0, 15))
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", table.slice(15))
    report = run(tmp_path / "data", tmp_path / "out")
    ((kind, entry),) = report.captions.items()
    assert kind.startswith("splits that are used together")
    assert entry["names"] == ["test, train"]
    assert run(tmp_path / "data/train-00000-of-00001.parquet", tmp_path / "one").captions == {}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"passed_over": 1, "captions": {}}\n', b'{"passed_over":{},"captions":{}}\n{']
)
def test_a_damaged_record_is_named(sounds, tmp_path, content):
    source = as_tars(sounds, tmp_path / "other")
    with pytest.raises(Interrupted):
        run(source, tmp_path / "out", shard_mb=0.03, progress=interrupt_at(3))
    (tmp_path / "out/.prepare/sounds.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"sounds\.jsonl is damaged .*: remove it, and the sounds are listed again"):
        run(source, tmp_path / "out", shard_mb=0.03)
    (tmp_path / "out/.prepare/sounds.jsonl").unlink()
    assert run(source, tmp_path / "out", shard_mb=0.03)


def test_a_disk_that_fails_stops_the_work(sounds, tmp_path, monkeypatch):
    source = SOURCES["tar"](sounds, tmp_path / "other")
    real, left = os.readv, [30]

    def failing(descriptor: int, buffers: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers)

    monkeypatch.setattr("trainer.data.clips._PAUSES", (0.0,))
    monkeypatch.setattr(os, "readv", failing)
    with pytest.raises(OSError, match="Input/output error"):
        run(source, tmp_path / "out")
    monkeypatch.setattr(os, "readv", real)
    assert run(source, tmp_path / "out").problems == []


# ---- the command


def test_the_command_takes_a_table(sounds, tmp_path, capsys):
    path = write_parquet(tmp_path / "a.parquet", table_of(rows_of(sounds)))
    command = ["prepare", "tiny", f"data.audio={path}", f"run_dir={tmp_path / 'run'}", "data.workers=1"]
    assert main([*command, "data.holdout=0.5"]) == 0
    assert f"{COUNT} files" in capsys.readouterr().err
