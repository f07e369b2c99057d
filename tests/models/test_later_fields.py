from dataclasses import dataclass

from models.documents import build
from models.later_fields import since, values_before, without_later


@dataclass
class Shape:
    size: int = 1
    kind: str = since("new", before="old")


def test_an_older_document_means_what_it_meant():
    assert build(Shape, {"size": 2}, "a file", mend="") == Shape(2, "old")
    assert build(Shape, {"size": 2, "kind": "new"}, "a file", mend="") == Shape(2, "new")


def test_a_later_field_that_means_the_same_is_left_out():
    assert values_before(Shape) == {"kind": "old"}
    assert without_later({"size": 2, "kind": "old"}, Shape) == {"size": 2}
    assert without_later({"size": 2, "kind": "new"}, Shape) == {"size": 2, "kind": "new"}
