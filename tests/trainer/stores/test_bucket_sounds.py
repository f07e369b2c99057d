"""Sounds at URLs give the sets of a local copy, read no more than is needed, and survive what networks do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import fsspec
import pytest

from launch.cli import main
from tests.nginx import Nginx
from tests.stores import SECRET
from tests.trainer.data.sound_sources import (
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
from tests.trainer.data.test_prepare import Interrupted, interrupt_at, run, write_sounds
from tests.trainer.data.test_prepare_from_elsewhere import made, problems_of
from trainer.data import bucket
from trainer.data.bucket import SourceError

COUNT = 12
FAST: dict[str, Any] = {"shard_mb": 0.03, "patience": 60}


@pytest.fixture(autouse=True)
def _fresh_buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has servers of its own, and waits little for them."""
    monkeypatch.setattr("trainer.data.remote._LONGEST_PAUSE", 0.05)
    bucket._bucket.cache_clear()
    yield
    bucket._bucket.cache_clear()


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Sounds in subfolders, with captions of all kinds and things that are passed over."""
    folder = write_sounds(tmp_path / "audio", {f"{n % 3}/sound{n:02d}.wav": 0.2 + 0.13 * (n % 9) for n in range(COUNT)})
    (folder / "0/sound00.txt").write_text("a knock")
    (folder / "1/sound01.json").write_text('{"caption": ["a door", "a wooden door"]}')
    (folder / "captions.jsonl").write_text('{"file": "2/sound02.wav", "caption": "Regen"}\n')
    (folder / "readme.md").write_text("about")
    (folder / ".hidden.wav").write_text("x")
    return folder


def upload(source: Path, url: str) -> None:
    filesystem, root = fsspec.core.url_to_fs(url)
    for path in [source] if source.is_file() else sorted(source.rglob("*")):
        if path.is_file():
            target = f"{root}/{path.relative_to(source).as_posix()}" if source.is_dir() else f"{root}/{path.name}"
            filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            filesystem.pipe_file(target, path.read_bytes())


# ---- the same sets


def test_a_bucket_gives_the_sets_of_its_local_copy(sounds, tmp_path, place):
    local = run(sounds, tmp_path / "whole", **FAST)
    upload(sounds, place.url)
    report = run(place.url, tmp_path / "out", **FAST)
    assert len(made(tmp_path / "out")) > 3
    assert made(tmp_path / "out") == made(tmp_path / "whole")
    assert report.content == local.content
    hidden = 0 if place.url.startswith("webdav") else 1  # nginx does not tell of it
    assert report.passed_over.keys() == {".md", *(["hidden"] if hidden else [])}
    assert report.captions == local.captions
    assert len(report.sources) == COUNT + 4 + hidden
    assert [path.name for path in (tmp_path / "out").glob(".prepare*")] == [".prepare.lock"]


@pytest.mark.parametrize("kind", ["tars", "parquet", "arrow", "saved", "manifest", "braces"])
def test_every_kind_of_source_at_a_url(sounds, tmp_path, s3, kind):
    for name in ("captions.jsonl", "1/sound01.json", ".hidden.wav"):
        (sounds / name).unlink()
    run(sounds, tmp_path / "whole", **FAST)
    url = s3.url
    if kind in ("tars", "braces"):
        upload(as_tars(sounds, tmp_path / "tars"), url)
        url += "/shard-{000..001}.tar" if kind == "braces" else ""
    elif kind == "saved":
        upload(save_to_disk(tmp_path / "saved", table_of(rows_of(sounds))), url)
    elif kind == "manifest":
        (sounds / "m.csv").write_text(
            "file,caption\n" + "".join(f"{n % 3}/sound{n:02d}.wav,{'a knock' * (n == 0)}\n" for n in range(COUNT))
        )
        upload(sounds, url)
        url += "/m.csv"
    else:
        write = {"parquet": write_parquet, "arrow": write_arrow}[kind]
        upload(write(tmp_path / f"t.{kind}", table_of(rows_of(sounds))), url)
        url += f"/t.{kind}"
    run(url, tmp_path / "out", **FAST)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_workers_and_parts_make_the_same_sets_of_a_bucket(sounds, tmp_path, s3):
    forkserver._forkserver._stop()  # an earlier test's has that test's environment, without the keys of this bucket
    run(sounds, tmp_path / "whole", **FAST)
    upload(sounds, s3.url)
    for part in (1, 0):
        run(s3.url, tmp_path / "out", workers=2, part=part, parts=2, **FAST)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_a_web_server_without_listings_takes_the_names_of_files(sounds, tmp_path):
    as_tars(sounds, tmp_path / "served/a b")
    run(tmp_path / "served/a b", tmp_path / "whole", **FAST)
    with Nginx(tmp_path / "served", tmp_path / "nginx") as nginx:
        run(f"{nginx.url}/plain/a%20b/shard-{{000..001}}.tar", tmp_path / "out", **FAST)
        run(f"{nginx.url}/whole/a%20b/shard-{{000..001}}.tar", tmp_path / "without ranges", **FAST)
        with pytest.raises(ValueError, match=r"is denied.*; a server that lists no files: give .*NAME-\{000"):
            run(f"{nginx.url}/plain/a%20b/", tmp_path / "other", **FAST)
        with pytest.raises(ValueError, match=r"shard-002\.tar is missing"):
            run(f"{nginx.url}/plain/a%20b/shard-002.tar", tmp_path / "other", **FAST)
    assert made(tmp_path / "out") == made(tmp_path / "without ranges") == made(tmp_path / "whole")


# ---- no more than is needed


def test_what_crosses_the_network_and_lies_on_the_disk(tmp_path, s3):
    """Of 8 MiB in members that are no sounds nothing is fetched, and the sounds lie on the disk one at a time."""
    folder = write_sounds(tmp_path / "audio", {f"{letter}.wav": 20.0 for letter in "abcd"})
    video = [(f"{number}.mp5", bytes(2 << 20)) for number in range(4)]
    upload(
        write_tar(
            tmp_path / "a.tar", [member for pair in zip(video, members_of(folder), strict=True) for member in pair]
        ),
        s3.url,
    )
    moved: Counter[str] = Counter()
    real = bucket.Bucket.read

    def read(self, name, start, end, size):
        moved["bytes"] += end - start
        return real(self, name, start, end, size)

    most = 0

    def look(tally: Any) -> None:
        nonlocal most
        files = [path for path in (tmp_path / "out/.prepare").rglob("sound") if path.is_file()]
        most = max(most, len(files))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket.Bucket, "read", read)
        run(f"{s3.url}/a.tar", tmp_path / "out", progress=look, **FAST)
    assert 4 * 320_000 < moved["bytes"] < 4 * 320_000 + (2 << 20)
    assert most == 0  # a fetched sound is gone once it is encoded


# ---- faults


@pytest.mark.parametrize("fault", ["500", "503", "cut"])
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_network_that_fails_now_and_then_changes_nothing(sounds, tmp_path, s3, kind, fault):
    run(sounds, tmp_path / "whole", **FAST)
    source = sounds
    if kind == "parquet":
        (sounds / ".hidden.wav").unlink()
        source = write_parquet(tmp_path / "t.parquet", table_of(rows_of(sounds)))
        run(source, tmp_path / "whole2", **FAST)
    upload(source, s3.url)
    count = Counter[str]()

    def now_and_then(method: str, path: str) -> str:
        count[method] += 1
        return fault if method == "GET" and count[method] % 4 == 2 else ""

    s3.proxy.fault = now_and_then
    run(f"{s3.url}/t.parquet" if kind == "parquet" else s3.url, tmp_path / "out", **FAST)
    assert count["GET"] > 10
    assert made(tmp_path / "out") == made(tmp_path / ("whole2" if kind == "parquet" else "whole"))


def test_a_network_that_stays_away_stops_the_work_which_goes_on_later(sounds, tmp_path, s3):
    run(sounds, tmp_path / "whole", **FAST)
    upload(sounds, s3.url)
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(s3.url, out, progress=interrupt_at(7), **FAST)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    s3.proxy.fault = lambda method, path: "503" if path.endswith(".wav") and method == "GET" else ""
    with pytest.raises(SourceError, match=r"sound\d\d\.wav could not be fetched for 0.2 s"):
        run(s3.url, out, shard_mb=0.03, patience=0.2)
    s3.proxy.fault = lambda method, path: ""
    run(s3.url, out, **FAST)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert made(out) == made(tmp_path / "whole")


@pytest.mark.parametrize("change", ["other bytes", "shorter", "gone"])
@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_an_object_that_changes_after_it_was_listed_stops_the_work(sounds, tmp_path, s3, kind, change):
    name = {"folder": "2/sound11.wav", "tar": "all.tar", "parquet": "a.parquet"}[kind]
    source = sounds if kind == "folder" else Path(SOURCES[kind](sounds, tmp_path / "other"))
    upload(source, s3.url)
    filesystem, root = fsspec.core.url_to_fs(s3.url)
    content = filesystem.cat_file(f"{root}/{name}")

    def alter(tally: Any) -> None:
        if tally.done == 1 and change == "gone":
            filesystem.rm_file(f"{root}/{name}")
        elif tally.done == 1:
            filesystem.pipe_file(f"{root}/{name}", content[:-1000] + (b"\1" * 1000 if change == "other bytes" else b""))

    url = s3.url if kind == "folder" else f"{s3.url}/{name}"
    with pytest.raises(SourceError, match=r"(changed|gone|removed|cut) .*run the same command again"):
        run(url, tmp_path / "out", progress=alter, **FAST)
    assert not (tmp_path / "out/report.json").exists()


def test_a_set_whose_bucket_has_changed_is_not_taken_for_finished(sounds, tmp_path, s3):
    upload(sounds, s3.url)
    first = run(s3.url, tmp_path / "out", **FAST)
    assert run(s3.url, tmp_path / "out", **FAST) == first
    filesystem, root = fsspec.core.url_to_fs(s3.url)
    filesystem.pipe_file(f"{root}/0/sound00.wav", (sounds / "1/sound01.wav").read_bytes())
    with pytest.raises(ValueError, match=r"\(files\), as s3://bucket/runs/a/0/sound00\.wav has changed: remove it"):
        run(s3.url, tmp_path / "out", **FAST)


def test_bad_objects_are_named_by_their_urls(sounds, tmp_path, s3):
    (sounds / "0/text.wav").write_text("no sound")
    (sounds / "m.jsonl").write_text(
        "".join(json.dumps({"file": name}) + "\n" for name in ("0/text.wav", "gone.wav", "../up.wav", "/etc/passwd"))
        + "".join(json.dumps({"file": f"{n % 3}/sound{n:02d}.wav"}) + "\n" for n in range(COUNT))
    )
    upload(sounds, s3.url)
    run(f"{s3.url}/m.jsonl", tmp_path / "out", **FAST)
    assert problems_of(tmp_path / "out") == {
        f"{s3.url}/0/text.wav": "can't be read as sound: Format not recognised",
        f"{s3.url}/gone.wav": "is missing",
        f"{s3.url}/../up.wav": "lies outside of the manifest's folder: give it by its URL",
        f"{s3.url}//etc/passwd": "lies outside of the manifest's folder: give it by its URL",
    }


def test_a_table_at_a_url_reads_no_file_of_this_machine(sounds, tmp_path, s3):
    rows = rows_of(sounds)
    rows[0]["audio"] = {"bytes": None, "path": str(sounds / "0/sound00.wav")}
    upload(write_parquet(tmp_path / "t.parquet", table_of(rows)), s3.url)
    upload(write_arrow(tmp_path / "t.arrow", table_of(rows)), s3.url)
    for kind in ("parquet", "arrow"):
        run(f"{s3.url}/t.{kind}", tmp_path / kind, **FAST)
        ((where, reason),) = problems_of(tmp_path / kind).items()
        assert where == f"{s3.url}/t.{kind} row 0"
        assert reason.endswith("in place of the sound's bytes, which have to be in the table")


def test_a_manifest_at_a_url_reads_no_file_of_this_machine(sounds, tmp_path, s3):
    chained = f"simplecache::file://{sounds}/1/sound04.wav"
    names = [f"file://{sounds}/0/sound00.wav", chained, *(f"{n % 3}/sound{n:02d}.wav" for n in range(1, COUNT))]
    (sounds / "m.jsonl").write_text("".join(json.dumps({"file": name}) + "\n" for name in names))
    upload(sounds, s3.url)
    run(f"{s3.url}/m.jsonl", tmp_path / "out", **FAST)
    problems = problems_of(tmp_path / "out")
    assert problems.keys() == {*names[:2]}
    assert set(problems.values()) == {"names a file of this machine, which a manifest at a URL may not"}


@pytest.mark.parametrize("secret", ["https://me:hunter2@host/a.wav", "https://host/a.wav?X-Amz-Signature=hunter2"])
def test_a_manifest_at_a_url_that_names_credentials_is_refused(sounds, tmp_path, s3, secret):
    """The names of sounds are in the sets, and those of bad sounds in the report."""
    (sounds / "m.jsonl").write_text(json.dumps({"file": secret}))
    upload(sounds, s3.url)
    with pytest.raises(ValueError, match="whose credentials reports and sets would show: leave them out") as error:
        run(f"{s3.url}/m.jsonl", tmp_path / "out", **FAST)
    assert "hunter2" not in str(error.value)
    assert not [path for path in (tmp_path / "out").rglob("*.*") if path.is_file() and b"hunter2" in path.read_bytes()]


# ---- credentials


@pytest.mark.parametrize("lack", ["refused", "missing"])
def test_credentials_that_are_gone_give_a_line_and_status_2(sounds, tmp_path, s3, monkeypatch, capsys, lack):
    upload(sounds, s3.url)
    if lack == "refused":
        s3.proxy.fault = lambda method, path: "403"
    else:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    command = ["prepare", "tiny", f"data.audio={s3.url}", f"run_dir={tmp_path / 'run'}", "data.workers=1"]
    assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is denied, check the credentials" in said
    assert "Traceback" not in said


def test_no_secret_is_written(sounds, tmp_path, s3, capsys):
    upload(sounds, s3.url)
    command = ["prepare", "tiny", f"data.audio={s3.url}", f"run_dir={tmp_path / 'run'}", "data.workers=1"]
    assert main([*command, "data.holdout=0.4"]) == 0
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 4
    assert not any(SECRET.encode() in path.read_bytes() for path in written)
    assert main([*command[:2], "data.audio=https://me:secret@host/a.tar", *command[3:]]) == 2
    said = capsys.readouterr().err
    assert "holds credentials, which configs and logs would show: leave them out" in said
    assert "me:" not in said
