"""The reader of JSON, JSONL and YAML: what it opens, what it checks, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pytest

from models import documents
from models.documents import DamagedDocument, Lines, Moment, Natural, append_lines, build, fits, read_json
from models.yaml_document import read_yaml


class Plan(TypedDict):
    name: str
    steps: NotRequired[Natural]
    parts: NotRequired[dict[str, list[int]]]


@dataclass
class Shape:
    width: int
    scale: float = 1.0


@dataclass
class Model:
    shapes: list[Shape] = field(default_factory=list)
    first: Shape | None = None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.json"


def said(path: Path, kind: Any = Plan, **options: Any) -> str:
    """Return what is said of a document that can't be read."""
    with pytest.raises(DamagedDocument) as caught:
        read_json(path, kind, mend="make it again", **options)
    return str(caught.value)


# --- what is opened ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a pipe"),
        (Path.mkdir, "a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to(path.parent), "a folder"),
    ],
)
def test_only_files_are_opened(path, make, kind):
    make(path)
    assert said(path) == f"{path} is damaged (it is {kind}, not a file): make it again"
    lines = Lines(path, Plan)
    assert list(lines) == []
    assert lines.remark == f"{path} can't be read and is passed over: it is {kind}, not a file"


def test_a_link_to_a_file_is_a_file(path):
    path.with_name("other").write_text('{"name": "a"}')
    path.symlink_to("other")
    assert read_json(path, Plan, mend="") == {"name": "a"}


def test_a_missing_document_is_told_from_a_damaged_one(path):
    with pytest.raises(FileNotFoundError):
        read_json(path, Plan, mend="")
    lines = Lines(path, Plan)
    assert (list(lines), lines.remark) == ([], "")


def test_no_more_is_read_than_a_document_may_have(path):
    path.write_bytes(b'{"name": "' + b"a" * 5000 + b'"}')
    assert said(path, most=4096) == f"{path} is damaged (it has more than 4 KiB): make it again"
    assert read_json(path, Plan, mend="", most=8192)["name"] == "a" * 5000


# --- what is checked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is not JSON: Expecting value"),
        (b'{"name": "a"', "it is not JSON: Expecting ',' delimiter"),
        (b"\xff\xfe", "it is not JSON: 'utf-8' codec can't decode"),
        (b"[" * 1_000_000, "it is nested too deeply"),
        (b'{"steps": ' + b"9" * 6000, "it is not JSON: Exceeds the limit"),
        (b"[]", "expected an object, got a list"),
        (b"{}", "object missing required field `name`"),
        (b'{"name": 1}', "`name`: expected text, got a whole number"),
        (b'{"name": "a", "steps": 1.5}', "`steps`: expected a whole number, got a number"),
        (b'{"name": "a", "steps": Infinity}', "`steps`: expected a whole number, got a number"),
        (b'{"name": "a", "steps": true}', "`steps`: expected a whole number, got true or false"),
        (b'{"name": "a", "steps": -1}', "`steps`: expected a whole number >= 0"),
        (b'{"name": "a", "parts": {"x": [1, null]}}', "`parts[...][1]`: expected a whole number, got null"),
    ],
)
def test_the_field_and_its_type_are_named(path, content, problem):
    path.write_bytes(content)
    told = said(path)
    assert told.startswith(f"{path} is damaged ({problem}")
    assert told.endswith("): make it again")
    assert "\n" not in told


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_if_asked(path, number):
    path.write_text(f'{{"a": {number}}}')
    assert read_json(path, dict[str, float], mend="").keys() == {"a"}
    assert f"{number} is not a finite number" in said(path, dict[str, float], finite=True)


@pytest.mark.parametrize("moment", [float("nan"), -1, 1e12])
def test_a_moment_is_within_the_calendar(moment):
    with pytest.raises(DamagedDocument):
        fits(moment, Moment, "x", mend="")


def test_further_fields_of_a_document_are_kept(path):
    path.write_text('{"name": "a", "colour": "red", "parts": {"x": [1]}}')
    assert read_json(path, Plan, mend="") == {"name": "a", "colour": "red", "parts": {"x": [1]}}


def test_a_dataclass_takes_its_own_fields_alone(path):
    path.write_text('{"shapes": [{"width": 1}], "first": {"width": 2, "scale": 3}}')
    assert read_json(path, Model, mend="") == Model([Shape(1)], Shape(2, 3.0))
    path.write_text('{"shapes": [{"width": 1, "depth": 2}]}')
    assert "it has an unknown field `shapes.depth`" in said(path, Model)
    path.write_text('{"shape": []}')
    assert "it has an unknown field `shape`" in said(path, Model)


def test_what_is_hashed_keeps_its_kind_of_number():
    assert repr(build(Shape, {"width": 1, "scale": 3}, "x", mend="").scale) == "3"
    assert repr(fits({"width": 1, "scale": 3}, Shape, "x", mend="").scale) == "3.0"
    with pytest.raises(DamagedDocument, match=r"x is damaged \(`width`: expected a whole number, got text\): mend"):
        build(Shape, {"width": "1"}, "x", mend="mend")


# --- lines ------------------------------------------------------------------------------------------------------------


def test_damaged_lines_are_passed_over_and_counted(path):
    good = [b'{"name": "a"}', b'{"name": "b\xe2\x80\xa8c", "more": 1}', b'{"name": "d"}']
    bad = [b'{"name": ', b"17", b'{"name": 1}', b"[" * 100_000, b'{"name": "' + b"x" * (2 << 20) + b'"}', b"\xff"]
    path.write_bytes(b"\n".join([good[0], *bad[:3], good[1], b"", *bad[3:], good[2]]))
    lines = Lines(path, Plan)
    assert [line["name"] for line in lines] == ["a", "b\u2028c", "d"]
    assert lines.damaged == len(bad)
    assert lines.remark.startswith(f"6 damaged lines are passed over in {path} (line 2: it is not JSON")
    assert [line for line, _ in lines.pairs()] == good
    assert lines.damaged == len(bad)


def test_the_end_of_a_long_file_is_read_from_a_whole_line_on(path):
    append_lines(path, [{"name": str(number)} for number in range(1000)])
    lines = Lines(path, Plan)
    assert [line["name"] for _, line in lines.pairs(tail=50)] == ["997", "998", "999"]
    assert lines.damaged == 0


def test_a_new_line_does_not_join_a_torn_one(path):
    path.write_text('{"name": "a"}\n{"na')
    append_lines(path, [Shape(1), {"name": "b"}], durable=True)
    assert path.read_text() == '{"name": "a"}\n{"na\n{"width": 1, "scale": 1.0}\n{"name": "b"}\n'


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"- a\n- b", "it is not a mapping"),
        (b"a: [", "it is not valid YAML"),
        (b"a: \xff", "it is not valid YAML"),
        (b"- " * 100_000, "nested more than 32 deep"),
        (b"[" * 100_000, "nested more than 32 deep"),
        (b"a: &a [*a]", "one that contains itself"),
        (b"a: " + b"x" * 300_000, "it has more than 256 KiB"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused(path, content, problem):
    path.write_bytes(content)
    with pytest.raises(DamagedDocument, match=problem):
        read_yaml(path, mend="make it again")


def test_aliases_are_counted_as_what_they_stand_for(path):
    path.write_text("a: &a {x: 1}\nb: {<<: *a, y: [*a, *a]}")
    assert read_yaml(path, mend="") == {"a": {"x": 1}, "b": {"x": 1, "y": [{"x": 1}, {"x": 1}]}}
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    path.write_text("\n".join(lines))
    with pytest.raises(DamagedDocument, match="it has more than 50000 values"):
        read_yaml(path, mend="")


# --- writing ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_json_writes(path):
    value = {"name": "tür", "steps": [1, 2.5, None, float("nan")]}
    documents.write_json(path, value, indent=1)
    assert path.read_text() == json.dumps(value, indent=1)
    documents.write_json(path, Shape(2), ascii=False, end="\n")
    assert path.read_text() == '{"width": 2, "scale": 1.0}\n'


def test_the_reader_needs_no_torch_and_no_yaml():
    program = "import sys, models.documents; print({'torch', 'yaml', 'omegaconf'} & sys.modules.keys())"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"
