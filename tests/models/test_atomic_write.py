"""Files appear whole or not at all, whatever their names are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.atomic_write import replacing, write_whole


@pytest.mark.parametrize("name", ["a", "a" * 255, "門" * 85, os.fsdecode(b"\xe9" * 255), ".spr", "line\nfeed"])
def test_a_file_of_any_name_is_written(tmp_path, name):
    write_whole(tmp_path / name, "first")
    write_whole(tmp_path / name, "second")
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    assert (tmp_path / name).read_text() == "second"


def half_written(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("half")
        assert partial.name.startswith(".")
        assert partial.name.endswith(".partial")
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["a", "a" * 255])
def test_what_fails_leaves_the_old_file(tmp_path, name):
    write_whole(tmp_path / name, "old")
    with pytest.raises(ZeroDivisionError):
        half_written(tmp_path / name)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == {tmp_path / name: "old"}


def test_long_names_of_one_beginning_are_written_at_once(tmp_path):
    paths = [tmp_path / ("a" * 254 + letter) for letter in "xy"]
    with replacing(paths[0]) as first, replacing(paths[1]) as second:
        assert first != second
        first.write_text("x")
        second.write_text("y")
    assert [Path(path).read_text() for path in paths] == ["x", "y"]
