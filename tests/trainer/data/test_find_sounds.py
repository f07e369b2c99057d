"""Which files of a folder are sounds, and what is said of all others."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from models.regular_file import open_regular
from trainer.data.find_sounds import Counts, find_audio, find_sounds, summary_of


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(folder: Path, **options: object) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_sounds(folder, **options).files]  # type: ignore[arg-type]


def test_subfolders_are_searched_and_the_rest_is_counted(tmp_path):
    touch(tmp_path, "b.wav", "a/z.FLAC", "a/b/c.ogg", "a.mp3", "x.jpg", "a/y.JPG", "README")
    touch(tmp_path, ".hidden.wav", ".git/x.wav", "a/._b.wav", "b.txt", "captions.jsonl", "notes.txt")
    found = find_sounds(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in found.files] == [
        "a.mp3",
        "a/b/c.ogg",
        "a/z.FLAC",
        "b.wav",
    ]
    assert found.files == find_audio(tmp_path)
    assert found.passed_over.report() == {
        ".jpg": {"count": 2, "names": ["x.jpg", "a/y.JPG"]},
        ".txt": {"count": 1, "names": ["notes.txt"]},  # the other one is a caption
        "hidden": {"count": 3, "names": [".git", ".hidden.wav", "a/._b.wav"]},
        "without suffix": {"count": 1, "names": ["README"]},
    }
    assert str(found.passed_over) == "hidden (3), .jpg (2), .txt (1), without suffix (1)"


@pytest.mark.parametrize("suffixes", [
    ("wav", "wave", "bwf", "rf64", "w64", "aif", "aiff", "aifc", "caf", "au", "snd", "flac", "ogg", "oga", "opus"),
    ("mp3", "m4a", "mp4", "aac", "webm", "mka", "wma", "WAV", "M4a"),
])  # fmt: skip
def test_all_usual_suffixes_are_sounds(tmp_path, suffixes):
    touch(tmp_path, *(f"{number}.{suffix}" for number, suffix in enumerate(suffixes)))
    assert len(names(tmp_path)) == len(suffixes)


def test_a_folder_without_sound_is_refused(tmp_path):
    touch(tmp_path, "a.txt")
    with pytest.raises(ValueError, match=r"holds no sound: .*\.wav, \.flac.*; it holds \.txt \(1\)"):
        find_audio(tmp_path)
    for path in (tmp_path / "missing", tmp_path / "a.txt"):
        with pytest.raises(ValueError, match=f"{path.name} is not a folder"):
            find_audio(path)


def test_links_to_folders_are_followed(tmp_path):
    touch(tmp_path, "disk/effects/a.wav", "disk/effects/deep/b.wav", "sounds/c.wav")
    (tmp_path / "sounds/effects").symlink_to(tmp_path / "disk/effects")
    assert names(tmp_path / "sounds") == ["c.wav", "effects/a.wav", "effects/deep/b.wav"]
    (tmp_path / "alone").symlink_to(tmp_path / "sounds")
    assert names(tmp_path / "alone") == ["c.wav", "effects/a.wav", "effects/deep/b.wav"]


def test_a_folder_is_searched_once_whatever_leads_to_it(tmp_path):
    touch(tmp_path, "disk/x/a.wav", "disk/x/y/b.wav", "sounds/own/c.wav")
    sounds = tmp_path / "sounds"
    for link, target in (
        *(("1", tmp_path / "disk/x/y"), ("2", tmp_path / "disk/x"), ("3", tmp_path / "disk/x")),
        *(("4", sounds / "own"), ("own/back", sounds), ("own/up", tmp_path)),
    ):
        (sounds / link).symlink_to(target)
    (tmp_path / "disk/x/round").symlink_to(tmp_path / "disk")
    found = find_sounds(sounds)
    assert names(sounds) == ["1/b.wav", "2/a.wav", "own/c.wav"]
    assert {kind: entry["names"] for kind, entry in found.passed_over.report().items()} == {
        "links to a folder above them": ["own/back", "own/up", "2/round"],
        "links to a folder that is searched anyway": ["3", "4"],
        "folders that a link leads to": ["2/y"],
    }


def test_a_file_that_several_links_lead_to_is_one_sound(tmp_path):
    touch(tmp_path, "disk/a.wav", "sounds/b.wav")
    sounds = tmp_path / "sounds"
    (sounds / "a1.wav").symlink_to(tmp_path / "disk/a.wav")
    (sounds / "a2.wav").symlink_to(tmp_path / "disk/a.wav")
    (sounds / "also b.oga").symlink_to(sounds / "b.wav")
    found = find_sounds(sounds)
    assert names(sounds) == ["a1.wav", "b.wav"]
    assert found.passed_over.names == {"links to a file that is found anyway": ["a2.wav", "also b.oga"]}


def test_what_is_no_file_is_told_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "broken.wav").symlink_to("nowhere.wav")
    (tmp_path / "round.wav").symlink_to("round.wav")
    (tmp_path / "zero.wav").symlink_to("/dev/zero")
    touch(tmp_path, "empty.wav", "folder.wav/inside.wav")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.wav"))
        found = find_sounds(tmp_path)
        reasons = {}
        for path in found.files:
            try:
                os.close(open_regular(path))
            except ValueError as error:
                reasons[path.name] = str(error).removeprefix(f"{path} ")
    assert reasons == {
        "broken.wav": "is a link to nowhere.wav, which is missing",
        "pipe.wav": "is a pipe, not a file",
        "round.wav": "is a link that leads back to itself",
        "socket.wav": "is a socket or a device, not a file",
        "zero.wav": "is a device, not a file",
    }
    assert {"empty.wav", "inside.wav"} < {path.name for path in found.files}
    assert found.passed_over.names == {"folders that are named like a file": ["folder.wav"]}
    with pytest.raises(ValueError, match="is a folder, not a file"):
        open_regular(tmp_path / "folder.wav")


@pytest.mark.parametrize("records", [
    ("latents/report.json",),
    ("latents/.prepare.lock",),
    ("pretrain/config.yaml", "pretrain/inputs.json"),
])  # fmt: skip
def test_directories_of_runs_are_not_searched(tmp_path, records):
    touch(tmp_path, "a.wav", "runs/one/page/audio/decoded.wav", *(f"runs/one/{name}" for name in records))
    assert names(tmp_path) == ["a.wav"]
    assert find_sounds(tmp_path).passed_over.names == {"directories of runs": ["runs/one"]}
    assert names(tmp_path / "runs/one") == ["page/audio/decoded.wav"]  # who names it means it


def test_a_config_of_a_run_is_told_from_others(tmp_path):
    touch(tmp_path, "a.wav", "one/page/x.wav", "two/page/y.wav")
    (tmp_path / "one/config.yaml").write_text("name: one\nrun_dir: runs/one\n")
    (tmp_path / "two/config.yaml").write_text("page: 2\n")
    assert names(tmp_path) == ["a.wav", "two/page/y.wav"]


def test_directories_of_the_own_run_are_not_searched(tmp_path):
    touch(tmp_path, "a.wav", "audio/b.wav", "evaluate/c.wav", "mine/d.wav", "page/e.wav")
    assert names(tmp_path, own=[tmp_path / "mine"]) == ["a.wav", "audio/b.wav", "evaluate/c.wav", "page/e.wav"]
    assert names(tmp_path, own=[tmp_path]) == ["a.wav", "audio/b.wav", "mine/d.wav"]
    assert names(tmp_path / "audio", own=[tmp_path]) == ["b.wav"]


def test_counts_are_exact_and_names_are_bounded():
    counts = Counts()
    for number in range(3000):
        counts.add(".jpg", f"{number}.jpg")
        counts.add(f".{number}", f"x.{number}")
    report = counts.report()
    assert sum(entry["count"] for entry in report.values()) == 6000
    assert (report[".jpg"]["count"], len(report[".jpg"]["names"])) == (3000, 1000)
    assert len(report) <= 1001
    assert summary_of(report).startswith(".jpg (3,000), of other kinds (2,001), .0 (1), ")
    assert summary_of(report).endswith(", others (993)")
