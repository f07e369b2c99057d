"""The listening page: whole, safe whatever the data holds, and true to the report."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from trainer import page
from trainer.page import read_curve, write_page

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

    def references(self) -> list[str]:
        return [e[name] for e in self.elements for name in ("src", "data-audio", "data-image", "href") if name in e]

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


def write_metrics(path: Path, lines: list[dict], torn: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn, encoding="utf-8")
    return path


def train_line(samples: int, loss: float | None = 1.0, **more: object) -> dict:
    return {"kind": "train", "samples": samples, "loss": loss, **more}


# ---- a folder that is whole


def test_everything_the_page_names_lies_in_its_folder(report, tmp_path):
    found = write(report, tmp_path)
    files = [name for name in found.references() if not name.startswith("https://arxiv.org/")]
    assert all((found.folder / name).is_file() for name in files)
    on_disk = {str(path.relative_to(found.folder)) for path in found.folder.rglob("*") if path.is_file()}
    assert on_disk == {*files, "index.html"}
    assert len(on_disk) == 1 + 2 * (2 * 9 - 1)  # sound and picture of 4 + 5 recordings of two clips, less one


def test_the_sound_is_copied_as_it_is(report, tmp_path):
    found = write(report, tmp_path)
    (player,) = (
        player for player, button in zip(found.find("div", "player"), found.find("button", "play"), strict=True)
        if button["aria-label"] == "Play Codes, caption wind"
    )  # fmt: skip
    source = tmp_path / "run" / report["clips"][1]["audio"]["zq"][0]
    assert (found.folder / player["data-audio"]).read_bytes() == source.read_bytes()


def test_the_page_needs_no_network_and_no_server(report, tmp_path):
    found = write(report, tmp_path)
    assert not found.find("link")
    assert not found.find("iframe")
    (script,) = found.find("script")
    assert set(script) == {"tag", "text"}
    assert "fetch(" not in script["text"]
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
    curve = write_metrics(tmp_path / "metrics.jsonl", [train_line(1), train_line(2)])
    found = write(report, tmp_path, curves={HOSTILE: curve}, config=HOSTILE)
    assert len(found.find("script")) == 1
    assert all(image["src"].startswith("images/") for image in found.find("img"))
    assert not [name for element in found.elements for name in element if name.startswith("on")]
    assert HOSTILE in found.texts("p", "caption")
    assert found.texts("h1") == [HOSTILE]
    assert found.texts("pre") == [HOSTILE]
    assert found.texts("b") == [HOSTILE]
    assert any(hint["data-note"].endswith(HOSTILE) for hint in found.find("button", "hint"))


def test_file_names_are_plain_whatever_the_keys_and_sources_are(report, tmp_path):
    source = tmp_path / "run" / "audio" / """a "b" #1%20 ü'<c>.FLAC"""
    soundfile.write(source, np.zeros(480), 48_000, format="FLAC")
    report["clips"][0]["audio"]["ae"] = [f"audio/{source.name}"]
    report["clips"][0]["key"] = report["clips"][0]["caption"] = "../../up " + "long" * 100
    found = write(report, tmp_path)
    files = [name for name in found.references() if "/" in name and not name.startswith("https:")]
    plain = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.")
    assert all(set(name.split("/", 1)[1]) <= plain and len(name) < 120 for name in files)
    assert all((found.folder / name).is_file() for name in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page", "run"]


def test_clips_and_systems_alike_in_their_plain_names_keep_their_own_files(report, tmp_path):
    report["clips"][0]["key"], report["clips"][1]["key"] = "a b", "a-b"
    found = write(report, tmp_path)
    audio = [player["data-audio"] for player in found.find("div", "player")]
    assert len(set(audio)) == len(audio) == 9


# ---- what it shows


def test_the_best_system_is_marked_and_ceilings_and_floors_do_not_compete(report, tmp_path):
    report["results"]["other"]["log_mel"]["mean"] = report["results"]["z"]["log_mel"]["mean"]
    report["results"]["ae"]["log_mel"]["mean"] = 21.0
    assert write(report, tmp_path).texts("strong") == ["8.0", "−7.2"]


def test_a_single_system_is_not_called_the_best(report, tmp_path):
    del report["results"]["z"]
    assert write(report, tmp_path).texts("strong") == []


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
    assert len(found.find("div", "player")) == 9


def test_the_tiles_hold_the_key_numbers(report, tmp_path):
    tiles = write(report, tmp_path).texts("div", "tile")
    assert tiles == [
        "Bit rate1.3kbps576 times less than 16-bit mono PCM",
        "Log-mel distance9.5dBCodes · AudioAE alone 1.5 · Another 21.0",
        "Encode30.1×real timecpu, 2 threads",
        "Decode4.25×real time16 steps · cpu, 2 threads",
    ]


def test_missing_audio_is_a_dash_in_its_cell(report, tmp_path):
    found = write(report, tmp_path)
    cells = found.texts("td", "role-floor")
    assert cells == ["Another", "Another—"]


def test_a_system_without_any_sound_stands_in_the_table_alone(report, tmp_path):
    report["systems"].append({"key": "silent", "title": "Figures alone", "role": "system"})
    report["results"]["silent"] = {"log_mel": {"mean": 3.0, "std": 1.0}}
    (body,) = write(report, tmp_path).texts("body")
    assert body.count("Figures alone") == 1


def test_decodes_of_the_same_codes_stand_behind_numbers(report, tmp_path):
    found = write(report, tmp_path)
    groups = found.texts("div", "takes")
    assert groups == ["12345", "12345"]
    buttons = [button for button in found.find("button") if button.get("aria-label", "").startswith("Decode ")]
    assert [button["aria-pressed"] for button in buttons] == ["true", "false", "false", "false", "false"] * 2
    assert len({button["data-audio"] for button in buttons}) == len({button["data-image"] for button in buttons}) == 10


def test_every_control_has_a_name_and_sliders_span_the_sound(report, tmp_path):
    found = write(report, tmp_path)
    assert all(e.get("aria-label") for e in [*found.find("button"), *found.find("input")])
    assert all(slider["max"] == "0.100" for slider in found.find("input"))


def test_the_config_is_shown(report, tmp_path):
    assert write(report, tmp_path, config="a:\n  b: <1>\n").texts("pre") == ["a:\n  b: <1>\n"]


# ---- loss curves


def test_a_chart_a_stage_with_a_line_a_noise_level(report, tmp_path):
    bins = [[0.1, None, 0.3], None, [0.2, None, 0.4]]
    lines = [train_line(100 * (i + 1), 1 / (i + 1), loss_ema=0.9, loss_bins=b) for i, b in enumerate(bins)]
    curves = {
        "pretrain": write_metrics(tmp_path / "a.jsonl", [{"kind": "start", "samples": 0}, *lines]),
        "finetune": write_metrics(tmp_path / "b.jsonl", [train_line(10, 2.0), train_line(20, 1.0)]),
        "quantize": write_metrics(tmp_path / "c.jsonl", [{"kind": "eval", "samples": 10, "loss": 1}]),
        "absent": tmp_path / "nowhere.jsonl",
    }
    found = write(report, tmp_path, curves=curves)
    assert found.texts("b") == ["pretrain", "finetune"]
    first, second = found.find("svg")
    assert first["aria-label"] == "Loss of stage pretrain: 0.9 after 300 samples"
    assert second["aria-label"] == "Loss of stage finetune: 1 after 20 samples"
    kinds = [line["class"] for line in found.find("polyline")]
    assert kinds == ["noise", "noise", "noise", "raw", "main", "raw", "main"]
    points = [[tuple(map(float, p.split(","))) for p in line["points"].split()] for line in found.find("polyline")]
    assert [len(line) for line in points] == [2, 0, 2, 3, 3, 2, 2]
    assert all(page._LEFT <= x <= page._RIGHT and page._TOP <= y <= page._BOTTOM for line in points for x, y in line)
    (x0, y0), (x1, y1) = points[-1]
    assert x0 < x1 == page._RIGHT
    assert y0 < y1  # a loss that falls goes down the page


def test_a_run_that_logs_no_moving_average_is_smoothed_here(report, tmp_path):
    lines = [train_line(i + 1, 2.0 + (-1) ** i) for i in range(200)]
    found = write(report, tmp_path, curves={"stage": write_metrics(tmp_path / "m.jsonl", lines)})
    raw, main = ([float(p.split(",")[1]) for p in e["points"].split()] for e in found.find("polyline"))
    assert main[0] == raw[0]
    assert max(main[50:]) - min(main[50:]) < 0.2 * (max(raw) - min(raw))
    assert np.mean(main[50:]) == pytest.approx(np.mean(raw), abs=1)


def test_torn_and_foreign_lines_are_passed_over(tmp_path):
    path = write_metrics(tmp_path / "m.jsonl", [train_line(1), train_line(2)], torn='{"kind": "train", "samp')
    assert [p.samples for p in read_curve(path)] == [1, 2]
    with path.open("ab") as file:
        file.write(b'{"kind": "train", "samples": 3, "loss": 1}\n17\n"text"\n{"kind": "train"}\n\xff\xfe\n\n')
        file.write(json.dumps(train_line(4)).encode() + b"\n" + b'{"kind": "train", "samples": 5, "loss": 0.')
    assert [p.samples for p in read_curve(path)] == [1, 2, 4]


def test_losses_that_are_no_numbers_leave_a_gap(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "train", "samples": 1, "loss": NaN, "loss_ema": Infinity, "loss_bins": [null, NaN, 2]}\n')
    (point,) = read_curve(path)
    assert (point.loss, point.smooth, point.by_noise) == (None, None, (None, None, 2.0))


def test_a_restart_from_an_earlier_checkpoint_takes_the_place_of_what_it_repeats(tmp_path):
    first = [train_line(s, 1.0) for s in (10, 20, 30, 40)]
    again = [train_line(s, 2.0) for s in (30, 35, 50)]
    curve = read_curve(write_metrics(tmp_path / "m.jsonl", [*first, *again]))
    assert [(p.samples, p.loss) for p in curve] == [(10, 1.0), (20, 1.0), (30, 2.0), (35, 2.0), (50, 2.0)]


def test_long_runs_are_thinned_to_means(tmp_path):
    lines = [train_line(i + 1, float(i % 2), loss_bins=[i % 2 or None]) for i in range(3000)]
    curve = read_curve(write_metrics(tmp_path / "m.jsonl", lines))
    assert len(curve) == 300
    assert {p.loss for p in curve} == {0.5}
    assert {p.by_noise for p in curve} == {(1.0,)}
    assert curve[-1].samples == 3000


@pytest.mark.parametrize("losses", [(1.0, 1.0), (0.0, 0.0), (-1.0, 3.0), (1e-6, 1e6), (5.0, 0.0), (1e-9, 2e-9)])
def test_charts_of_odd_losses_have_ticks_within_the_plot(losses, report, tmp_path):
    curve = write_metrics(tmp_path / "m.jsonl", [train_line(i + 1, loss) for i, loss in enumerate(losses)])
    ticks = write(report, tmp_path, curves={"stage": curve}).find("text", "y")
    assert 2 <= len(ticks) <= 14
    assert all(page._TOP <= float(tick["y"]) <= page._BOTTOM for tick in ticks)
    assert len({tick["text"] for tick in ticks}) == len(ticks)


# ---- faults


def test_an_incomplete_report_is_refused_by_name(report, tmp_path):
    del report["systems"], report["results"]
    with pytest.raises(ValueError, match="lacks systems, results"):
        write(report, tmp_path)


def test_a_role_that_is_none_is_refused(report, tmp_path):
    report["systems"][2]["role"] = "star"
    with pytest.raises(ValueError, match="'z' has no known role"):
        write(report, tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"no sound at all"])
def test_audio_that_is_missing_or_broken_is_named(content, report, tmp_path):
    path = tmp_path / "run" / report["clips"][0]["audio"]["z"][0]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bell-z-0\.flac: no readable audio"):
        write(report, tmp_path)
    assert not (tmp_path / "page" / "index.html").exists()
