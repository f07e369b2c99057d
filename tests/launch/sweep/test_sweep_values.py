"""What a user types: values of a grid, the file of `--points`, random draws, and names of points."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.sweep.names import name_of
from launch.sweep.points import wanted
from launch.sweep.points_file import read_points
from launch.sweep.random_draws import Draw, draws
from launch.sweep.values import split_values

FILE = """
grid:
  autoencode.lr: [1e-4, 3e-4]
  data.buckets: [[9, 18], []]
  name_of_nothing: ["a,b", 'it''s', 007, on, null, "ä \\" b"]
paired:
- {latent_encoder.pooling: [9, 18], autoencode.crop_frames: [63, 126]}
- {lora.rank: [1, 2, 3], lora.alpha: [1, 2, 3]}
"""
RANDOM = """
random:
  number: {number}
  seed: 7
  ranges:
    finetune.lr: {{log_uniform: [1e-5, 1e-3]}}
    finetune.decay: {{uniform: [0, 0.5]}}
    lora.rank: {{integers: [4, 64]}}
    lora.variant: {{choices: [plain, dora, "a,b"]}}
"""
GOLDEN = [
    {"finetune.lr": "0.0001544", "finetune.decay": "0.2027", "lora.rank": "52", "lora.variant": "dora"},
    {"finetune.lr": "0.000847", "finetune.decay": "0.3284", "lora.rank": "36", "lora.variant": "plain"},
    {"finetune.lr": "2.685e-05", "finetune.decay": "0.2019", "lora.rank": "40", "lora.variant": "dora"},
]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("[1,2],[3,4]", ["[1,2]", "[3,4]"]),
        ("[1,2]", ["[1,2]"]),
        ("{a: 1, b: [2,3]},{a: 4}", ["{a: 1, b: [2,3]}", "{a: 4}"]),
        ('"a,b",c', ['"a,b"', "c"]),
        (r'"a\",b",c', [r'"a\",b"', "c"]),
        ("'it''s, so',x", ["'it''s, so'", "x"]),
        ("it's,that's", ["it's", "that's"]),
        ("${oc.env:A,b},c", ["${oc.env:A,b}", "c"]),
        ('["],"],x', ['["],"]', "x"]),
        ("", [""]),
        ("a b, c", ["a b", " c"]),
    ],
)
def test_commas_inside_a_value_separate_nothing(text: str, values: list[str]):
    assert split_values(text) == values


@pytest.mark.parametrize(
    ("text", "mend"), [("[1,2", "lacks a `]`"), ('"a', 'closing "'), ("a,,b", "empty"), ("a,", "empty")]
)
def test_a_value_without_an_end_is_told_with_its_mend(text: str, mend: str):
    with pytest.raises(ValueError, match=mend):
        split_values(text)


def test_a_grid_has_every_combination_and_single_values_are_of_all_points():
    asked = wanted("tiny", ["autoencode.lr=1e-4,3e-4", "seed=3", "lora.rank=2,4,8"], None)
    assert asked.overrides == ["seed=3"]
    assert len(asked.points) == 6
    assert asked.points[1] == {"autoencode.lr": "1e-4", "lora.rank": "4"}


def test_a_single_value_of_a_key_that_differs_already_makes_a_point():
    assert wanted("tiny", ["lora.rank=16"], None, swept=["lora.rank"]).points == [{"lora.rank": "16"}]


def test_all_that_is_wrong_with_the_keys_is_told_at_once():
    given = ["run_dir=a,b", "cluster.nodes=1,2", "lora.rank=1,2", "lora.rank=3,4", "lora.alpha=[1", "seed=1,,2"]
    with pytest.raises(ValueError, match="run_dir can't differ") as raised:
        wanted("tiny", given, None)
    told = str(raised.value)
    assert "cluster.nodes can't differ" in told
    assert "lora.rank is given twice" in told
    assert "lora.alpha: [1 lacks" in told
    assert "seed: 1,,2 has an empty value" in told
    with pytest.raises(ValueError, match="no setting has several values"):
        wanted("tiny", ["seed=1"], None)
    with pytest.raises(ValueError, match="seed has one value and several"):
        wanted("tiny", ["seed=1", "seed=1,2"], None)


def test_a_file_keeps_values_as_they_were_typed(tmp_path: Path):
    (tmp_path / "points.yaml").write_text(FILE)
    found = read_points(tmp_path / "points.yaml")
    assert found.problems == []
    by_key = {key: [point[key] for point in group] for group in found.groups for key in group[0]}
    assert by_key["autoencode.lr"] == ["1e-4", "3e-4"]
    assert by_key["data.buckets"] == ["[9, 18]", "[]"]
    assert by_key["name_of_nothing"] == ['"a,b"', '"it\'s"', "007", "on", "null", '"ä \\" b"']
    assert found.groups[3] == [
        {"latent_encoder.pooling": "9", "autoencode.crop_frames": "63"},
        {"latent_encoder.pooling": "18", "autoencode.crop_frames": "126"},
    ]
    assert len(wanted("tiny", [], tmp_path / "points.yaml").points) == 2 * 2 * 6 * 2 * 3


def test_all_that_is_wrong_with_a_file_is_told_at_once(tmp_path: Path):
    path = tmp_path / "points.yaml"
    path.write_text(
        "grids: {a: [1]}\ngrid: {a: []}\npaired: {a: [1, 2], b: [1]}\n"
        "random: {number: 3, ranges: {a: {uniform: [2, 1]}, b: {integers: [0.5, 2]}, c: {log_uniform: [0, 1]}}}\n"
    )
    told = "\n".join(read_points(path).problems)
    for part in ("nearest known one is grid", "a has no values", "a has 2, b has 1", "a must have a low end below"):
        assert part in told
    for part in ("b has ends that are no whole numbers", "c must be above 0"):
        assert part in told
    for text in ("- a\n", "a: [1\n", "random: {number: 0, ranges: {a: {choices: [1]}}}", "random: {number: 1}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"points\.yaml"):
            wanted("tiny", [], path)


def test_random_points_are_the_same_everywhere_and_more_of_them_keep_the_first(tmp_path: Path):
    path = tmp_path / "points.yaml"
    path.write_text(RANDOM.format(number=3))
    few = wanted("tiny", [], path).points
    assert few == GOLDEN
    path.write_text(RANDOM.format(number=40))
    many = wanted("tiny", [], path).points
    assert many[:3] == GOLDEN
    assert all(1e-5 <= float(point["finetune.lr"]) <= 1e-3 for point in many)
    assert {point["lora.variant"] for point in many} == {"plain", "dora", '"a,b"'}
    path.write_text(RANDOM.format(number=3).replace("ranges:\n", "ranges:\n    seed: {integers: [0, 9]}\n"))
    assert [{key: point[key] for key in GOLDEN[0]} for point in wanted("tiny", [], path).points] == GOLDEN


def test_a_draw_reaches_both_ends_and_its_text_is_exact():
    whole = draws({"a": Draw("integers", ("-1", "2"))}, number=200, seed=0)
    assert {point["a"] for point in whole} == {"-1", "0", "1", "2"}
    narrow = draws({"a": Draw("uniform", ("1.00001", "1.00002"))}, number=50, seed=0)
    assert len({point["a"] for point in narrow}) > 40
    for point in draws({"a": Draw("log_uniform", ("1e-9", "1e9"))}, number=200, seed=0):
        assert repr(float(point["a"])) == point["a"]
        assert 1e-9 <= float(point["a"]) <= 1e9


@pytest.mark.parametrize(
    ("settings", "begin"),
    [
        ({"finetune.lr": "1e-4", "autoencode.lr": "3e-4"}, "autoencode.lr=3e-4,finetune.lr=1e-4"),
        ({"lora.variant": '"dora"'}, "lora.variant=dora"),
        ({"data.audio": "/data/my sounds"}, "data.audio=data_my_sounds-"),
        ({"data.audio": "../../../etc"}, "data.audio=.._.._.._etc-"),
        ({"data.buckets": "[9, 18]"}, "data.buckets=9_18-"),
        ({"name_": "ä\n$(rm -rf ~)'\"\0"}, "name_=rm_-rf-"),
        ({"data.audio": "x" * 5000}, "data.audio=xxx"),
    ],
)
def test_a_name_is_safe_whatever_the_values_hold(settings: dict[str, str], begin: str, tmp_path: Path):
    name = name_of(settings)
    assert name.startswith(begin)
    assert len(name.encode()) <= 100
    (tmp_path / name).mkdir()
    assert (tmp_path / name).resolve().parent == tmp_path


def test_names_differ_where_settings_do_even_on_a_disk_that_ignores_case():
    names = list[str]()
    for value in ("a/b", "a b", "a_b", "A_B", "x" * 200, "x" * 201, "ä", "ö"):
        names.append(name_of({"data.audio": value}, names))
    assert len({name.casefold() for name in names}) == len(names)
