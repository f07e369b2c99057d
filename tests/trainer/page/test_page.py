"""The listening page: whole, safe whatever the data holds, and true to the report."""

from __future__ import annotations

import base64
import copy
import errno
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import soundfile

from trainer.page import write_page
from trainer.page.recordings import require_recordings

HOSTILE = """</td></table><script>alert("x")</script>'"><img src=x onerror=alert(1)> &amp; пёс 🐕"""
VOID = {"img", "input", "meta"}


class Page(HTMLParser):
    """A parsed page: its elements with attributes and text. Tags that don't match fail."""

    def __init__(self, index: Path):
        super().__init__(convert_charrefs=True)
        self.folder = index.parent
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.feed(index.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names))
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def find(self, tag: str, class_: str | None = None) -> list[dict]:
        return [
            e for e in self.elements if e["tag"] == tag and (class_ is None or class_ in (e.get("class") or "").split())
        ]

    def texts(self, tag: str, class_: str | None = None) -> list[str]:
        return [element["text"] for element in self.find(tag, class_)]

    def references(self) -> set[str]:
        """Files that the page names: its pictures and sounds."""
        names = [e["data-sound"] for e in self.elements if "data-sound" in e]
        files = {file for name in names for file in (f"audio/{name}.js", f"images/{name}.png")}
        return files | {e["src"] for e in self.elements if "src" in e}

    def section(self, id_: str) -> Page:
        """The part of that name alone."""
        part = copy.copy(self)
        start = next(i for i, e in enumerate(self.elements) if e.get("id") == id_)
        ends = (i for i, e in enumerate(self.elements) if i > start and e["tag"] in ("section", "footer"))
        part.elements = self.elements[start : next(ends)]
        return part

    def figures_of(self, title: str) -> list[str]:
        """The cells beside a system's title in the table of figures."""
        row = next(e for e in self.elements if e["tag"] == "tr" and e["text"].startswith(title))
        rest = self.elements[self.elements.index(row) + 1 :]
        end = next(i for i, e in enumerate(rest) if e["tag"] in ("tr", "section"))
        return [e["text"] for e in rest[:end] if e["tag"] == "td"]


@pytest.fixture
def report(tmp_path: Path) -> dict:
    """Two clips, six systems; five decodes of the codes; the second clip lacks one system."""
    systems: list[dict] = [
        {"key": "original", "title": "Original", "role": "original"},
        {"key": "ae", "title": "AudioAE alone", "role": "ceiling", "note": "No codec between."},
        {"key": "z", "title": "Continuous z", "role": "system", "detail": "11.1 Hz × 64"},
        {"key": "zq", "title": "Codes", "role": "system", "payload_kbps": 1.333, "file_kbps": 1.36},
        {"key": "other", "title": "Another", "role": "floor"},
    ]
    clips: list[dict] = [
        {"key": key, "caption": f"caption {key}", "seconds": 0.1, "audio": record(tmp_path / "run", key, systems)}
        for key in ("bell", "wind")
    ]
    del clips[1]["audio"]["other"]
    results = {
        "ae": {"log_mel": {"mean": 1.5, "std": 0.25}, "si_sdr": {"mean": 18.0, "std": 1.0}},
        "z": {"log_mel": {"mean": 8.0, "std": 2.0}, "si_sdr": {"mean": -9.0, "std": 3.0}},
        "zq": {"log_mel": {"mean": 9.5, "std": 2.0}, "si_sdr": {"mean": -7.25, "std": None}},
        "other": {"log_mel": {"mean": 21.0, "std": 4.0}},
    }
    figures = [
        {"key": "log_mel", "title": "Log-mel distance", "unit": "dB", "better": "lower", "note": "Of mel spectra."},
        {"key": "si_sdr", "title": "SI-SDR", "unit": "dB", "better": "higher"},
    ]
    speed = {"encode_realtime_factor": 30.1, "decode_realtime_factor": 4.25, "steps": 16, "device": "cpu, 2 threads"}
    return {
        "recipe": "demo", "model_hash": "a91f03", "created": "2026-11-23", "subtitle": "A trial.",
        "sample_rate": 48_000, "speed": speed,
        "systems": systems, "figures": figures, "results": results, "clips": clips,
    }  # fmt: skip


def record(root: Path, clip: str, systems: list[dict]) -> dict[str, list[str]]:
    (root / "audio").mkdir(parents=True, exist_ok=True)
    paths = {}
    for system in systems:
        names = [f"audio/{clip}-{system['key']}-{n}.flac" for n in range(5 if "payload_kbps" in system else 1)]
        for n, name in enumerate(names):
            wave = np.sin(np.arange(4800) * 0.05 * (n + 1 + len(system["key"])))
            soundfile.write(root / name, 0.5 * wave, 48_000)
        paths[system["key"]] = names
    return paths


def write(report: dict, tmp_path: Path, *, curves: dict[str, Path] | None = None, config: str = "seed: 1") -> Page:
    return Page(
        write_page(report, tmp_path / "page", audio_root=tmp_path / "run", curves=curves or {}, config_text=config)
    )


# ---- a folder that is whole


def test_everything_the_page_names_lies_in_its_folder(report, tmp_path):
    found = write(report, tmp_path)
    files = found.references()
    on_disk = {str(path.relative_to(found.folder)) for path in found.folder.rglob("*") if path.is_file()}
    assert on_disk == {*files, "index.html"}
    assert len(on_disk) == 1 + 2 * (2 * 9 - 1)  # sound and picture of 4 + 5 recordings of two clips, less one


def test_the_sound_is_handed_over_as_it_is(report, tmp_path):
    found = write(report, tmp_path)
    (player,) = (e for e in found.section("low").find("div", "player") if "wind-zq" in e["data-sound"])
    script = (found.folder / f"audio/{player['data-sound']}.js").read_text()
    name, content = re.fullmatch(r'spressoSound\("(.+)","(.+)"\);\n', script).groups()
    assert name == player["data-sound"]
    assert base64.b64decode(content) == (tmp_path / "run" / report["clips"][1]["audio"]["zq"][0]).read_bytes()


def test_the_page_needs_no_network_and_no_server(report, tmp_path):
    found = write(report, tmp_path)
    assert not found.find("link")
    assert not found.find("iframe")
    (script,) = found.find("script")
    assert set(script) == {"tag", "text"}
    assert "fetch(" not in script["text"]
    assert {link["href"][0] for link in found.find("a")} <= {"#", "h"}
    assert "import" not in script["text"]
    assert "url(" not in found.find("style")[0]["text"]


def test_written_again_it_is_the_same(report, tmp_path):
    first = write(report, tmp_path)
    before = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    write(report, tmp_path)
    assert {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()} == before


# ---- data stays data


def test_hostile_text_is_shown_and_never_run(report, tmp_path):
    report |= {"recipe": HOSTILE, "model_hash": HOSTILE, "created": HOSTILE, "subtitle": HOSTILE}
    report["speed"]["device"] = HOSTILE
    report["clips"][0] |= {"caption": HOSTILE, "key": HOSTILE}
    for part in (*report["systems"], *report["figures"]):
        part |= {"title": part["title"] + HOSTILE, "note": HOSTILE, "detail": HOSTILE, "unit": HOSTILE}
    curve = tmp_path / "metrics.jsonl"
    curve.write_text("".join(f'{{"kind": "train", "samples": {n}, "loss": 1}}\n' for n in (1, 2)))
    found = write(report, tmp_path, curves={HOSTILE: curve}, config=HOSTILE)
    assert len(found.find("script")) == 1
    assert all(image["src"].startswith("images/") for image in found.find("img"))
    assert not [name for element in found.elements for name in element if name.startswith("on")]
    assert HOSTILE in found.texts("p", "caption")
    assert found.texts("h1") == [HOSTILE]
    assert found.texts("pre") == [HOSTILE]
    assert found.texts("b") == [HOSTILE]
    assert {e["data-caption"] for e in found.find("tbody") if "data-clip" in e} == {HOSTILE, "caption wind"}
    assert any(hint["data-note"].endswith(HOSTILE) for hint in found.find("button", "hint"))


@pytest.mark.parametrize("losses", [(1e308, -1e308), (1e308, 1e308)])
def test_losses_beyond_all_scales_leave_the_page_whole(report, tmp_path, losses):
    curve = tmp_path / "metrics.jsonl"
    lines = ({"kind": "train", "samples": n, "loss": loss} for n, loss in enumerate((*losses, 0.5, 0.4), 1))
    curve.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write(report, tmp_path, curves={"pretrain": curve}).find("svg")


def test_file_names_are_plain_whatever_the_keys_and_sources_are(report, tmp_path):
    source = tmp_path / "run" / "audio" / """a "b" #1%20 ü'<c>.FLAC"""
    soundfile.write(source, np.zeros(480), 48_000, format="FLAC")
    report["clips"][0]["audio"]["ae"] = [f"audio/{source.name}"]
    report["clips"][0]["key"] = report["clips"][0]["caption"] = "../../up " + "long" * 100
    found = write(report, tmp_path)
    files = found.references()
    plain = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.")
    assert all(set(name.split("/", 1)[1]) <= plain and len(name) < 120 for name in files)
    assert all((found.folder / name).is_file() for name in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page", "run"]


def test_clips_and_systems_alike_in_their_plain_names_keep_their_own_files(report, tmp_path):
    report["clips"][0]["key"], report["clips"][1]["key"] = "a b", "a-b"
    found = write(report, tmp_path)
    assert len([name for name in found.references() if name.startswith("audio/")]) == 2 * 9 - 1


# ---- what it shows


def test_the_best_of_a_range_of_rates_is_marked_and_ceilings_and_floors_do_not_compete(report, tmp_path):
    report["systems"] += [
        {"key": "zq1", "title": "Fewer codes", "role": "system", "payload_kbps": 0.7},
        {"key": "opus", "title": "Opus", "role": "baseline", "payload_kbps": 6.0},
        {"key": "least", "title": "Least codes", "role": "system", "payload_kbps": 0.1},
    ]
    report["results"]["ae"]["log_mel"]["mean"] = 0.1
    report["results"] |= {
        "zq1": {"log_mel": {"mean": 9.75}, "si_sdr": {"mean": -7.0}},
        "opus": {"log_mel": {"mean": 9.6}, "si_sdr": {"mean": 3.0}},
        "least": {"log_mel": {"mean": 0.2}, "si_sdr": {"mean": 0.5}},
    }
    found = write(report, tmp_path)
    assert found.texts("strong") == ["9.5", "3.0"]
    assert found.figures_of("Codes")[1].startswith("9.5")
    assert found.figures_of("Opus")[2].startswith("3.0")


def test_a_single_system_is_not_called_the_best(report, tmp_path):
    assert write(report, tmp_path).texts("strong") == []


def test_intervals_controls_and_what_cannot_be_told_from_the_best(report, tmp_path):
    report["systems"].insert(2, {"key": "best", "title": "Best", "role": "system"})
    report["results"]["best"] = {"log_mel": {"mean": 7.5, "ci": [7.0, 8.25], "control": 19.0, "significant": False}}
    report["results"]["z"]["log_mel"] |= {"ci": [7.5, 8.5], "control": 20.55, "significant": False}
    report["results"]["zq"]["log_mel"] |= {"ci": None, "control": None, "significant": True}
    found = write(report, tmp_path)
    assert found.figures_of("Best") == ["—", "7.5[7.0, 8.2](19.0)", "—"]
    assert found.figures_of("Continuous z") == ["—", "≈8.0[7.5, 8.5](20.6)", "−9.0± 3.0"]
    assert found.figures_of("Codes")[1] == "9.5± 2.0"
    (lead,) = found.section("figures").texts("p", "lead")
    assert all(words in lead for words in ("95 % confidence", "In round brackets", "≈ marks values that do not differ"))


def test_what_guessing_would_reach_stands_in_the_head(report, tmp_path):
    report["figures"].append({"key": "retrieval", "title": "Retrieval", "unit": "%", "better": "higher", "digits": 1})
    assert "chance" not in "".join(write(report, tmp_path).texts("th"))
    report["figures"][-1]["chance"] = 100 / 48
    heads = write(report, tmp_path).texts("th")
    assert [head for head in heads if "chance" in head] == ["Retrieval?% ↑chance: 2.1"]


def test_other_codecs_stand_apart_with_their_licence_or_why_they_are_not_there(report, tmp_path):
    report["systems"] += [
        {"key": "dac", "title": "DAC", "role": "baseline", "payload_kbps": 1.7, "licence": "MIT", "note": "A note."},
        {"key": "gone", "title": "Gone", "role": "baseline", "licence": "CC", "unavailable": "no weights"},
    ]
    report["results"]["dac"] = {"log_mel": {"mean": 4.0}}
    found = write(report, tmp_path)
    assert found.figures_of("Gone") == ["—", "Not available: no weights"]
    groups = [row["text"] for row in found.find("tr", "role")]
    assert groups == [
        "Ceiling: no codec built on it can be better", "Continuous", "Continuous: other codecs", "Low rates",
        "Low rates: other codecs", "Floors: decodes that ignore the clip",
    ]  # fmt: skip
    rows = [e["text"] for e in found.find("th") if e.get("scope") == "row"]
    assert "DAC?MIT" in rows
    assert "GoneCC" in rows


def test_what_was_not_measured_is_a_dash(report, tmp_path):
    report["results"]["z"]["log_mel"] = {"mean": float("nan"), "std": None}
    del report["results"]["ae"]["si_sdr"]
    found = write(report, tmp_path)
    assert found.figures_of("Continuous z") == ["—", "—", "−9.00± 3.00"]
    assert found.figures_of("AudioAE alone") == ["—", "1.5± 0.2", "—"]
    assert found.figures_of("Codes") == ["1.331.36 in files", "9.5± 2.0", "−7.25"]
    assert found.figures_of("Another") == ["—", "21.0± 4.0", "—"]


def test_a_report_without_figures_speed_and_notes_makes_a_page(report, tmp_path):
    for key in ("speed", "subtitle", "model_hash", "created"):
        del report[key]
    report |= {"figures": [], "results": {}}
    for system in report["systems"]:
        for key in ("payload_kbps", "file_kbps", "note", "detail"):
            system.pop(key, None)
    found = write(report, tmp_path)
    assert found.texts("h1") == ["demo"]
    assert not found.find("div", "tile")
    assert len(found.section("continuous").find("div", "player")) == 2 * 5 - 1  # without rates all are continuous
    assert len(found.section("variability").find("div", "player")) == 2 * 6


def test_the_tiles_hold_the_key_numbers(report, tmp_path):
    tiles = write(report, tmp_path).texts("div", "tile")
    assert tiles == [
        "Bit rate1.3kbps576 times less than 16-bit mono PCM",
        "Log-mel distance9.5dBCodes · AudioAE alone 1.5 · Another 21.0",
        "Encode30.1×real timecpu, 2 threads",
        "Decode4.25×real time16 steps · cpu, 2 threads",
    ]


def test_the_headline_is_of_a_codec_that_the_page_plays(report, tmp_path):
    report["systems"].append({"key": "before", "title": "Before", "role": "system", "payload_kbps": 1.3})
    report["results"]["before"] = {"log_mel": {"mean": 1.0}}
    assert "Log-mel distance9.5dBCodes" in write(report, tmp_path).texts("div", "tile")[1]


def test_missing_audio_is_a_dash_in_its_cell(report, tmp_path):
    found = write(report, tmp_path)
    for part in ("continuous", "low"):
        assert found.section(part).texts("td", "role-floor") == ["Another", "Another—"]


def test_a_system_without_any_sound_stands_in_the_table_alone(report, tmp_path):
    report["systems"].append({"key": "silent", "title": "Figures alone", "role": "system"})
    report["results"]["silent"] = {"log_mel": {"mean": 3.0, "std": 1.0}}
    (body,) = write(report, tmp_path).texts("body")
    assert body.count("Figures alone") == 1


def test_each_range_of_rates_has_a_grid_with_the_original_and_what_belongs_to_all(report, tmp_path):
    report["systems"].insert(
        4, {"key": "low", "title": "Named", "role": "system", "payload_kbps": 9, "table": "ultra_low"}
    )
    report["systems"][1]["table"] = report["systems"][-1]["table"] = "continuous"  # a bound belongs to all
    report["systems"].insert(0, {"key": "opus", "title": "Opus", "role": "baseline", "payload_kbps": 0.4, "table": ""})
    for clip in report["clips"]:
        clip["audio"] |= {"low": clip["audio"]["z"], "opus": clip["audio"]["z"]}
    found = write(report, tmp_path)
    heads = {
        part: [e["text"] for e in found.section(part).find("th") if e.get("scope") == "col"]
        for part in ("continuous", "low", "ultra-low")
    }
    assert heads == {
        "continuous": ["Original", "AudioAE alone?", "Continuous z11.1 Hz × 64", "Another"],
        "low": ["Original", "AudioAE alone?", "Codes", "Another"],
        "ultra-low": ["Original", "AudioAE alone?", "Named", "Opus", "Another"],
    }
    links = [link["href"] for link in found.find("a")]
    assert links[:6] == ["#figures", "#continuous", "#low", "#ultra-low", "#variability", "#config"]


def test_sound_is_there_to_hear_even_without_a_codec(report, tmp_path):
    report["systems"] = [s for s in report["systems"] if s["role"] != "system"]
    assert len(write(report, tmp_path).section("clips").find("div", "player")) == 2 * 3 - 1


def test_decodes_of_the_same_codes_stand_behind_numbers_and_side_by_side(report, tmp_path):
    found = write(report, tmp_path)
    assert found.section("low").texts("div", "takes") == ["12345", "12345"]
    buttons = [button for button in found.find("button") if button.get("aria-label", "").startswith("Decode ")]
    assert [button["aria-pressed"] for button in buttons] == ["true", "false", "false", "false", "false"] * 2
    sounds = [button["data-sound"] for button in buttons]
    assert len(set(sounds)) == 10
    players = found.section("variability").find("div", "player")
    assert [p["data-column"] for p in players] == ["original", "1", "2", "3", "4", "5"] * 2
    assert [p["data-sound"] for p in players if p["data-column"] != "original"] == sounds


def test_of_many_rates_the_variability_shows_four_that_span_them(report, tmp_path):
    audio = [clip["audio"] for clip in report["clips"]]
    for n in range(6):
        report["systems"].append({"key": f"q{n}", "title": f"Rate {n}", "role": "system", "payload_kbps": 0.4})
        for files in audio:
            files[f"q{n}"] = files["zq"][: 1 if n == 2 else 2]
    found = write(report, tmp_path).section("variability")
    assert found.texts("th", "rate") == ["Rate", *["Codes", "Rate 1", "Rate 3", "Rate 5"] * 2]


def test_every_control_has_a_name_and_sliders_span_the_sound(report, tmp_path):
    found = write(report, tmp_path)
    assert all(e.get("aria-label") or e["text"] for e in [*found.find("button"), *found.find("input")])
    assert all(slider["max"] == "0.100" for slider in found.find("input"))
    assert all(player["style"] == "--seconds: 0.100" for player in found.find("div", "player"))


def test_the_config_is_shown(report, tmp_path):
    assert write(report, tmp_path, config="a:\n  b: <1>\n").texts("pre") == ["a:\n  b: <1>\n"]


# ---- faults


def test_an_incomplete_report_is_refused_by_name(report, tmp_path):
    del report["systems"], report["results"]
    with pytest.raises(ValueError, match="lacks systems, results"):
        write(report, tmp_path)


def test_a_role_that_is_none_is_refused(report, tmp_path):
    report["systems"][2]["role"] = "star"
    with pytest.raises(ValueError, match="'z' has an unknown role"):
        write(report, tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"no sound at all"])
def test_audio_that_is_missing_or_broken_is_named(content, report, tmp_path):
    path = tmp_path / "run" / report["clips"][0]["audio"]["z"][0]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bell-z-0\.flac: no readable audio.*remove it, and `spresso evaluate` makes"):
        write(report, tmp_path)
    with pytest.raises(ValueError, match=r"bell-z-0\.flac.*`spresso evaluate` makes it again"):
        require_recordings(report, tmp_path / "run")
    assert not (tmp_path / "page" / "index.html").exists()


def lead_away(path: Path, to: Path, *, folder: bool) -> None:
    """Move a recording, or its folder, to another place, and leave a link."""
    moved = path.parent if folder else path
    moved.rename(to)
    moved.symlink_to(to)


@pytest.mark.parametrize("folder", [False, True])
def test_a_link_out_of_the_evaluation_is_not_copied(report, tmp_path, folder):
    path = tmp_path / "run" / report["clips"][0]["audio"]["z"][0]
    lead_away(path, tmp_path / "private", folder=folder)
    for work in (write, lambda report, tmp_path: require_recordings(report, tmp_path / "run")):
        with pytest.raises(ValueError, match=rf"\.flac leads out of {tmp_path}/run to {tmp_path}/private") as error:
            work(report, tmp_path)
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "page").rglob("*z-0*"))


def test_links_within_the_evaluation_and_to_it_are_followed(report, tmp_path):
    write(report, tmp_path)
    expected = (tmp_path / "page/index.html").read_bytes()
    lead_away(tmp_path / "run/audio/bell-z-0.flac", tmp_path / "run/elsewhere.flac", folder=False)
    (tmp_path / "run").rename(tmp_path / "disk")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    write(report, tmp_path)
    assert (tmp_path / "page/index.html").read_bytes() == expected


def test_audio_that_can_not_be_read_now_is_not_called_damaged(report, tmp_path, monkeypatch):
    def fails(path: Path) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(OSError, match=r"\.flac") as failure:
        require_recordings(report, tmp_path / "run")
    assert failure.value.errno == errno.EIO
