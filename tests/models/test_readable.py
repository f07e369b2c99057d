from __future__ import annotations

import os

import pytest

from models.atomic_write import write_whole
from models.readable import describe_os_error, file_trouble, folder_trouble, require_file


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("content")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "good").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_what_is_wrong_with_a_path_is_said(place):
    for name, for_file, for_folder in (
        ("file", "", "is a file, not a folder"),
        ("good", "", "is a file, not a folder"),
        ("folder", "is a folder, not a file", ""),
        ("missing", "is missing", "is missing"),
        ("broken", "is a link to nowhere, which is missing", "is a link to nowhere, which is missing"),
        ("loop", "is a link that leads back to itself", "is a link that leads back to itself"),
        ("pipe", "is a pipe, not a file", "is a pipe, not a folder"),
        ("file/in", "is missing: a part of its path is a file, not a folder", None),
        ("x" * 300, "has a name that is too long for this disk", None),
    ):
        assert file_trouble(place / name) == for_file
        if for_folder is not None:
            assert folder_trouble(place / name) == for_folder
    with pytest.raises(ValueError, match="pipe is a pipe, not a file"):
        require_file(place / "pipe")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_lack_of_permission_is_said(place):
    (place / "file").chmod(0)
    (place / "folder").chmod(0)
    assert file_trouble(place / "file") == "can't be opened: permission denied"
    assert folder_trouble(place / "folder") == "can't be opened: permission denied"
    assert file_trouble(place / "folder" / "in") == "can't be opened: permission denied"


def test_errors_of_the_system_begin_with_the_path(place):
    for name, words in (
        ("missing", "missing is missing"),
        ("broken", "broken is a link to nowhere, which is missing"),
        ("folder", "folder is a folder, not a file"),
    ):
        with pytest.raises(OSError, match=name) as caught:
            open(name)  # noqa: PTH123, SIM115
        assert describe_os_error(caught.value) == words
    assert describe_os_error(OSError("no path")) == "no path"
    assert describe_os_error(OSError(5, "Input/output error", "disk")) == "disk failed: input/output error"


def test_a_folder_a_pipe_or_a_device_is_not_written(place):
    for path in (place / "folder", place / "pipe"):
        with pytest.raises(ValueError, match="can't be written as a file"):
            write_whole(path, "text")
    assert sorted(path.name for path in place.iterdir()) == ["broken", "file", "folder", "good", "loop", "pipe"]
