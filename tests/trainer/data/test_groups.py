"""Which files are held out, and which others go with them."""

from __future__ import annotations

import pytest

from trainer.data.groups import groups, held_out


def test_held_out_names_stay_when_others_come():
    names = [f"sound{n}" for n in range(2000)]
    tested = held_out(names, fraction=0.1, seed=0)
    assert 150 < len(tested) < 250
    assert held_out(names[:1000], fraction=0.1, seed=0) == tested & set(names[:1000])
    assert held_out(reversed(names), fraction=0.1, seed=0) == tested
    assert len(held_out(names, fraction=0.1, seed=1) & tested) < 50
    assert held_out(names, fraction=0, seed=0) == set()
    for seed in range(20):
        assert len(held_out(names[:2], fraction=0.01, seed=seed)) == 1
        assert len(held_out(names[:2], fraction=0.99, seed=seed)) == 1
        assert held_out(names[:1], fraction=0.01, seed=seed) <= {names[0]}


PARTS = ("mixture", "vocals", "drums", "bass", "other")


def test_the_parts_of_a_song_stay_together():
    places = [(f"song_{n:02d}", part) for n in range(12) for part in PARTS]
    assert groups(places) == [folder for folder, _ in places]
    assert groups([(f"song_{n:02d}", "mixture") for n in range(12)]) == [f"song_{n:02d}" for n in range(12)]
    assert groups([(f"song_{n}", part) for n in range(4) for part in PARTS]) == [
        f"song_{n}" for n in range(4) for _ in PARTS
    ]


def test_a_part_that_one_song_alone_has_stays_with_it():
    places = [(f"song_{n:02d}", part) for n in range(12) for part in ("mixture", f"solo of {n}", f"noise of {n}")]
    assert groups(places) == [folder for folder, _ in places]


def test_parts_in_a_folder_of_their_own_go_to_the_song():
    """Slakh has Track00001/mix.wav and Track00001/stems/S00.wav."""
    places = [
        place for n in range(9) for place in ((f"T{n}", "mix"), *((f"T{n}/stems", f"S{s:02d}") for s in range(4)))
    ]
    assert groups(places) == [folder.partition("/")[0] for folder, _ in places]


def test_a_song_in_two_folders_is_one_song():
    places = [(f"{half}/song_{n}", part) for half in ("dry", "wet") for n in range(8) for part in PARTS]
    assert groups(places) == [folder.partition("/")[2] for folder, _ in places]


@pytest.mark.parametrize("places", [
    [("", f"sound{n}") for n in range(30)],
    [(folder, f"s{n}") for n in range(30) for folder in ("a", "b")],  # two forms of each sound
    [(folder, f"s{n}") for n in range(30) for folder in ("close", "near", "far")],
    [(f"word{w}", f"speaker{s}") for w in range(8) for s in range(60)],
    [(f"class{c}", f"{n:02d}") for c in range(50) for n in range(40)],  # numbers that only count
    [("house", "door"), ("car", "door"), *[(f, f"{f}{n}") for f in ("house", "car") for n in range(9)]],
    [(folder, f"{folder}{n}") for folder in "abcd" for n in range(9)] + [(folder, "noise") for folder in "abc"],
])  # fmt: skip
def test_elsewhere_the_name_alone_decides(places):
    assert groups(places) == [name for _, name in places]


def test_a_part_in_a_folder_of_many_other_sounds_says_nothing_of_them():
    many = [("big", f"sound{n}") for n in range(500)]
    small = [(folder, "noise") for folder in ("big", "b", "", "c")]
    assert groups(many + small) == [name for _, name in many] + ["noise", "b", "noise", "c"]


def test_numbers_in_very_many_folders_are_parts():
    places = [(f"video{v}", f"{n:05d}") for v in range(100) for n in range(5)]
    assert groups(places) == [folder for folder, _ in places]
