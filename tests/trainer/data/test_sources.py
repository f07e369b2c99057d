"""The sound files of a folder or a manifest: names, keys and captions."""

from __future__ import annotations

import errno
import json
import os
import time
import unicodedata
from pathlib import Path

import pytest

from trainer.data.sources import SoundFile, find_sources, list_sources
from trainer.data.sources_before import list_sources_as_before


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
    rain = [source.key for source in sources.values() if source.place[1].lower() == "rain"]
    assert rain == ["RAIN", "rain-2", "rain-3", "Rain-4"]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("captions.jsonl", b"{", r"captions.jsonl, line 1 is not JSON"),
    ("captions.jsonl", b'{"file": "a.wav", "caption": "x"}\n["a"]', "captions.jsonl, line 2 is not like"),
    ("captions.jsonl", b'{"caption": "x"}', "line 1 is not like"),
    ("captions.jsonl", '{"file": "a.wav", "caption": "Tür"}'.encode("latin-1"), "is not text in UTF-8"),
    ("captions.jsonl", b'{"file": "a.wav", "caption": [1]}', "line 1 is not like"),
])  # fmt: skip
def test_captions_that_cannot_be_read_are_refused(tmp_path, name, content, message):
    (tmp_path / "a.wav").touch()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list_sources(tmp_path)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def by_name(audio: Path) -> dict[str, SoundFile]:
    return {source.name: source for source in list_sources(audio)}


def json_lines(*entries: object) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def test_files_of_captions_that_cannot_be_read_are_named(tmp_path):
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    (tmp_path / "a.txt").write_bytes("Tür".encode("latin-1"))
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.json").write_text('{"caption": ["one", "two", "one"]}')
    found = find_sources(tmp_path)
    assert [source.caption for source in found.files] == ["a", "b", "one"]
    assert found.files[2].facts == {"captions": ["one", "two"]}
    assert found.captions.names == {
        "files of captions that can't be read": [str(tmp_path / "a.txt"), str(tmp_path / "b.json")],
        "sounds with several captions, whose first is used": ["c.wav"],
    }


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("name", ["a.txt", "a.json", "captions.jsonl"])
def test_captions_on_a_failing_disk_stop_the_work(tmp_path, monkeypatch, name, number):
    touch(tmp_path, "a.wav")
    (tmp_path / name).write_text(json_lines({"file": "a.wav", "caption": "rain"}))
    real = os.open

    def fail(path, *arguments):
        if Path(path).name == name:
            raise OSError(number, os.strerror(number), path)
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match=rf"{name} failed: ") as error:
        find_sources(tmp_path)
    assert error.value.errno == number


@pytest.mark.parametrize("name", ["a.txt", "a.json", "captions.jsonl"])
def test_captions_whose_disk_is_away_are_not_made_of_names(tmp_path, name):
    touch(tmp_path, "a.wav")
    (tmp_path / name).symlink_to(tmp_path / "away/caption")
    with pytest.raises(ValueError, match=rf"{name} is a link to .*/away/caption, which is missing"):
        find_sources(tmp_path)


@pytest.mark.parametrize(("make", "kind"), [(Path.mkdir, "a folder"), (os.mkfifo, "a pipe")])
def test_what_is_no_file_of_captions_is_told(tmp_path, make, kind):
    touch(tmp_path, "a.wav", "b.wav", "b.json")
    for name in ("a.txt", "b.txt"):
        make(tmp_path / name)
    (tmp_path / "b.json").write_text('{"caption": "rain"}')
    found = find_sources(tmp_path)
    named = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    if kind == "a folder":  # such a name says nothing about a caption
        assert ([source.caption for source in found.files], found.captions.names) == (["a", "rain"], {})
    else:
        assert found.captions.names == {"files of captions that can't be read": named}
    make(tmp_path / "captions.jsonl")
    with pytest.raises(ValueError, match=rf"captions\.jsonl is {kind}, not a file"):
        find_sources(tmp_path)


def test_captions_find_their_sounds_however_they_are_spelled(tmp_path):
    decomposed, composed = (unicodedata.normalize(form, "Tür.wav") for form in ("NFD", "NFC"))
    touch(tmp_path, decomposed, "a.wav", "sub/w.wav", "sub/é.wav", "z.wav")
    (tmp_path / "captions.jsonl").write_text(
        json_lines(
            {"file": composed, "caption": "oak"},
            {"file": "./a.wav", "caption": "tin"},
            {"file": "sub\\w.wav", "caption": "wires"},
            {"file": str(tmp_path / "sub/é.wav"), "caption": "e"},
            {"file": "gone.wav", "caption": "not there"},
            {"file": "z.wav", "caption": ["first", "second"]},
            {"file": "z.wav", "caption": "third"},
        ),
        encoding="utf-8",
    )
    found = find_sources(tmp_path)
    captions = {source.name: source.caption for source in found.files}
    assert captions == {decomposed: "oak", "a.wav": "tin", "sub/w.wav": "wires", "sub/é.wav": "e", "z.wav": "first"}
    assert found.files[-1].facts == {"captions": ["first", "second", "third"]}
    assert found.captions.names == {
        "captions that name no sound": ["gone.wav (not there)"],
        "sounds with several captions, whose first is used": ["z.wav"],
    }


def test_a_manifest_finds_its_sounds_however_they_are_spelled(tmp_path, monkeypatch):
    decomposed, composed = (unicodedata.normalize(form, "Tür.wav") for form in ("NFD", "NFC"))
    touch(tmp_path, decomposed, "sub/w.wav", "home/h.wav", "a\\b.wav")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    entries = [{"file": name} for name in (composed, "sub\\w.wav", "~/h.wav", "a\\b.wav", "gone\\ö.wav")]
    (tmp_path / "m.jsonl").write_text(json_lines(*entries), encoding="utf-8")
    found = {source.name: source.path for source in list_sources(tmp_path / "m.jsonl")}
    assert found == {
        decomposed: tmp_path / decomposed,
        "sub/w.wav": tmp_path / "sub/w.wav",
        str(tmp_path / "home/h.wav"): tmp_path / "home/h.wav",
        "a\\b.wav": tmp_path / "a\\b.wav",
        "gone\\ö.wav": tmp_path / "gone\\ö.wav",
    }
    (tmp_path / "m.jsonl").write_text(json_lines({"file": "sub/w.wav"}, {"file": "./sub/w.wav"}))
    with pytest.raises(
        ValueError, match=r"names \./sub/w\.wav and sub/w\.wav, which are one file: name each file once"
    ):
        list_sources(tmp_path / "m.jsonl")


@pytest.mark.parametrize("text", [
    "file,caption\na.wav,rain\nb.wav,\"wind, cold\"\n",
    "\ufefffile;caption\r\na.wav;rain\r\nb.wav;wind, cold\r\n",
    "file\tcaption\na.wav\train\nb.wav\twind, cold\n",
    "caption , file\nrain,a.wav\n\n\"wind, cold\",b.wav",
])  # fmt: skip
def test_tables_as_programs_write_them(tmp_path, text):
    (tmp_path / "m.csv").write_text(text, encoding="utf-8", newline="")
    found = {source.name.strip(): source.caption for source in list_sources(tmp_path / "m.csv")}
    assert found == {"a.wav": "rain", "b.wav": "wind, cold"}


@pytest.mark.parametrize(("name", "text", "message"), [
    ("m.csv", 'file,caption\na.wav,"rain\nb.wav,wind\n', "is not CSV: a quotation mark is never closed"),
    ("m.csv", "file,caption\na.wav,rain\n\n,wind\n", "line 4 names no file"),
    ("m.jsonl", '{"file": "a\\u0000.wav"}', "line 1 names no file"),
    ("m.jsonl", '{"file": "a\\u001b.wav"}\n{"file": "a\\u001b.wav"}', r"line 2 names a\\x1b\.wav again"),
])  # fmt: skip
def test_manifests_that_would_lose_something_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list_sources(tmp_path / name)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\u001c", "\x0b", "\x0c"])
def test_only_a_newline_ends_a_line_of_json(tmp_path, mark):
    touch(tmp_path, "a.wav", "b.wav")
    caption = "\\u001c" if mark == "\u001c" else "\\u000b" if mark == "\x0b" else "\\f" if mark == "\x0c" else mark
    text = f'{{"file": "a.wav", "caption": "a door{caption}opens"}}\r\n{{"file": "b.wav", "caption": "rain"}}\n'
    for path in (tmp_path / "m.jsonl", tmp_path / "captions.jsonl"):
        path.write_text(text, encoding="utf-8", newline="")
    for audio in (tmp_path, tmp_path / "m.jsonl"):
        assert [source.caption for source in list_sources(audio)] == ["a door opens", "rain"]


def test_captions_of_names_keep_their_marks(tmp_path):
    names = ["दरवाज़ा खुलता है", "ประตู_เปิด", unicodedata.normalize("NFD", "Tür öffnet-02"), "می‌خواهم", "🚪️ bell"]
    touch(tmp_path, *(f"{name}.wav" for name in names))
    expected = {"दरवाज़ा खुलता है", "ประตู เปิด", "tür öffnet", "می‌خواهم", "bell"}
    assert {source.caption for source in list_sources(tmp_path)} == {unicodedata.normalize("NFC", c) for c in expected}


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    touch(tmp_path, "caf\\xe9.wav")
    os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9.wav", os.O_CREAT))
    sources = list_sources(tmp_path)
    assert [source.name for source in sources] == ["caf\\xe9.wav", "caf\\xe9.wav"]
    assert [os.fsencode(source.path.name) for source in sources] == [b"caf\\xe9.wav", b"caf\xe9.wav"]
    assert [source.key for source in sources] == ["caf-xe9", "caf"]
    assert [source.caption for source in sources] == ["caf xe", "caf"]
    assert sources[1].place == ("", "caf\\xe9")
    (tmp_path / "captions.jsonl").write_text(json_lines({"file": "a.wav", "caption": "x"}))
    (tmp_path / "half.jsonl").write_text('{"file": "a.wav", "caption": "half a \\ud83d", "note": "\\ud83d"}')
    assert list_sources(tmp_path / "half.jsonl")[0].caption == "half a \\ud83d"


def test_a_key_for_each_of_many_names_alike_takes_no_time(tmp_path):
    (tmp_path / "m.csv").write_text("file\n" + "".join(f"{n}/門.wav\n" for n in range(50_000)), encoding="utf-8")
    start = time.process_time()  # whatever else the machine does meanwhile
    sources = list_sources(tmp_path / "m.csv")
    assert time.process_time() - start < 30  # with the square of their number, an hour
    assert sorted(source.key for source in sources) == sorted(["sound", *(f"sound-{n}" for n in range(2, 50_001))])


def test_what_release_0_1_0_listed(tmp_path):
    touch(
        tmp_path,
        "a.wav",
        "b.m4a",
        "दरवाज़ा.wav",
        ".c.wav",
        "runs/one/latents/report.json",
        "runs/one/page/d.wav",
        "e.ogg",
    )
    touch(tmp_path.parent / f"{tmp_path.name}-more", "f.wav")
    (tmp_path / "more").symlink_to(tmp_path.parent / f"{tmp_path.name}-more")
    (tmp_path / "again.wav").symlink_to("a.wav")
    (tmp_path / "captions.jsonl").write_text(
        json_lines(
            *({"file": "a.wav", "caption": text} for text in ("one", "two")), {"file": "./e.ogg", "caption": "x"}
        )
    )
    assert [(source.name, source.caption) for source in list_sources_as_before(tmp_path)] == [
        *(("a.wav", "two"), ("again.wav", "again"), ("e.ogg", "e"), ("runs/one/page/d.wav", "d")),
        ("दरवाज़ा.wav", "दरव ज"),
    ]
    assert [source.name for source in list_sources(tmp_path)] == ["a.wav", "b.m4a", "e.ogg", "more/f.wav", "दरवाज़ा.wav"]
