from __future__ import annotations

import pytest

from trainer.data.sound_files import held_out, list_sources


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


def test_captions_and_keys(tmp_path):
    names = [
        "Door_Open-02.wav", "sub/dog.bark.wav", "rain.wav", "bell.wav", "wind.ogg", "03.wav", "sub/rain.wav", "門.wav",
        "Été.wav", "RAIN.flac", "z/Rain.wav",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "captions.jsonl").write_text(
        '{"file": "sub/rain.wav", "caption": "Rain on\\na roof", "more": 1}\n\n{"file": "gone.wav", "caption": "x"}\n'
    )
    (tmp_path / "rain.txt").write_text("\ufeffHeavy rain \n")
    (tmp_path / "bell.json").write_text('{"caption": "A bell"}')
    (tmp_path / "wind.json").write_text('{"other": 1}')
    sources = {source.name: source for source in list_sources(tmp_path)}
    assert {name: source.caption for name, source in sources.items()} == {
        "Door_Open-02.wav": "door open", "sub/dog.bark.wav": "dog bark", "rain.wav": "Heavy rain", "bell.wav": "A bell",
        "wind.ogg": "wind", "03.wav": "03", "sub/rain.wav": "Rain on a roof", "門.wav": "門", "Été.wav": "été",
        "RAIN.flac": "rain", "z/Rain.wav": "rain",
    }  # fmt: skip
    keys = [source.key.lower() for source in sources.values()]
    assert len(set(keys)) == len(names)
    assert sources["sub/dog.bark.wav"].key == "dog-bark"
    assert sources["Été.wav"].key == "Ete"
    rain = [source.key for source in sources.values() if source.base_name.lower() == "rain"]
    assert rain == ["RAIN", "rain-2", "rain-3", "Rain-4"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("captions.jsonl", b"{", r"captions.jsonl, line 1 is not JSON"),
    ("captions.jsonl", b'{"file": "a.wav", "caption": "x"}\n["a"]', "captions.jsonl, line 2 is not like"),
    ("captions.jsonl", b'{"caption": "x"}', "line 1 is not like"),
    ("a.json", b"{", "a.json is not JSON"),
    ("a.txt", b"\xff\xfe\xff", "a.txt is not text in UTF-8"),
])  # fmt: skip
def test_captions_that_cannot_be_read_are_refused(tmp_path, name, content, message):
    (tmp_path / "a.wav").touch()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list_sources(tmp_path)
