"""Files appear whole or not at all, whatever their names are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.atomic_write import remove_leftovers, replacing, write_whole


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


def test_what_a_killed_process_left_is_removed_before_its_parent_waits_for_it(tmp_path):
    code = "import time; from pathlib import Path; from models.atomic_write import replacing\n"
    code += f"with replacing(Path({str(tmp_path / 'a.flac')!r})) as partial: partial.touch(); print(1, flush=True); "
    code += "time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline() == b"1\n"
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.iterdir())) == 1, "the writer lives"
        writer.kill()
        assert writer.stdout.read() == b"", "the writer has ended, and nobody has asked how"
        while "Z" not in Path(f"/proc/{writer.pid}/stat").read_text().rpartition(")")[2]:
            pass
        remove_leftovers(tmp_path)
        assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    code = "import os; from pathlib import Path; from models.atomic_write import replacing\n"
    code += f"with replacing(Path({str(tmp_path / 'a.flac')!r})) as partial: partial.touch(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2])
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    elsewhere = left.with_name(left.name.replace(os.uname().nodename, "another-host"))
    host, namespace, pid = left.name.removesuffix(".partial").rsplit("-", 2)
    contained = left.with_name(f"{host}-{int(namespace) + 1}-{pid}.partial")
    for path in (elsewhere, contained, tmp_path / ".hidden", tmp_path / "x.partial"):
        path.touch()
    with replacing(tmp_path / "b.flac") as mine:
        mine.write_text("b")
        remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(elsewhere.name, contained.name),
        *(".hidden", "x.partial", "b.flac"),
    }
