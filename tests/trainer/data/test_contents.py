"""Sets are recognized by what their files hold: a copy has other times and the same sounds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.data.test_prepare import FakeAE, run, write_sounds
from trainer.data.locate import Asked
from trainer.data.prepare import prepare
from trainer.data.text_embeddings import TextFiles


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    return write_sounds(tmp_path / "audio", {f"sound{n}.wav": 0.6 for n in range(8)})


def set_times(folder: Path, seconds: int = 1_000_000_000) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (seconds, seconds))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.tar")}


def test_a_copied_folder_of_sounds_gives_the_finished_sets(sounds, tmp_path):
    before = run(sounds, tmp_path / "out", holdout=0.5)
    shutil.copytree(sounds, tmp_path / "copy", copy_function=shutil.copyfile)
    set_times(tmp_path / "copy")
    made = files_of(tmp_path / "out")
    after = run(tmp_path / "copy", tmp_path / "out", holdout=0.5)
    assert after.content == before.content != {}
    assert after.settings["files"] != before.settings["files"]
    assert files_of(tmp_path / "out") == made


def test_the_new_times_are_kept_so_that_the_sounds_are_read_once(sounds, tmp_path, monkeypatch):
    run(sounds, tmp_path / "out", holdout=0.5)
    set_times(sounds)
    run(sounds, tmp_path / "out", holdout=0.5)
    monkeypatch.setattr(
        "trainer.data.set_content.content_digests", lambda paths: pytest.fail("the sounds are read again")
    )
    run(sounds, tmp_path / "out", holdout=0.5)


def test_a_sound_of_the_same_size_with_other_bytes_in_its_middle_is_another(sounds, tmp_path):
    run(sounds, tmp_path / "out", holdout=0.5)
    path = sounds / "sound3.wav"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"other settings \(files\)"):
        run(sounds, tmp_path / "out", holdout=0.5)


def test_other_settings_are_refused_in_a_copy_too(sounds, tmp_path):
    run(sounds, tmp_path / "out", holdout=0.5)
    set_times(sounds)
    with pytest.raises(ValueError, match=r"other settings \(files, seed\)"):
        run(sounds, tmp_path / "out", holdout=0.5, seed=1)


def test_sets_of_an_older_version_are_recognized_while_the_times_are_the_same(sounds, tmp_path):
    run(sounds, tmp_path / "out", holdout=0.5)
    path = tmp_path / "out/report.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "content"}))
    assert run(sounds, tmp_path / "out", holdout=0.5).files == 8
    set_times(sounds)
    with pytest.raises(ValueError, match=r"other settings \(files\)"):
        run(sounds, tmp_path / "out", holdout=0.5)


class Embeddings:
    """Makes the reader of embeddings in a folder; picklable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> TextFiles:
        return TextFiles(self.folder, tokens=4)


def test_copied_embeddings_are_the_same_text(sounds, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for path in sounds.iterdir():
        np.save(text / f"{path.stem}.npy", np.ones((2, 3), np.float32))
    make = Embeddings(text)

    def again() -> dict[str, str]:
        report = prepare(Asked(sounds), tmp_path / "out", FakeAE, make, clip_seconds=0.5, holdout=0.5, seed=0)
        assert report is not None
        return report.content

    before = again()
    set_times(tmp_path)
    assert again() == before
    assert before.keys() == {"files", "text"}
    np.save(text / "sound0.npy", np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"other settings \(text\)"):
        again()
