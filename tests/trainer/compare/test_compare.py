"""Comparisons of runs: what differs is shown, what is the same is not, and nothing of another's is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from launch.cli import main
from tests.trainer.page.browser import chromium
from tests.trainer.page.test_page import HOSTILE, Page
from trainer.compare import tables
from trainer.compare.comparison import compare
from trainer.compare.page import write_comparison
from trainer.compare.runs import labels
from trainer.recipes.reading import load_recipe
from trainer.recipes.values import to_yaml

CLIPS = 40
FIGURES = [
    {"key": "log_mel", "title": "Log-mel distance", "unit": "dB", "better": "lower", "note": "", "digits": 2},
    {"key": "si_sdr", "title": "SI-SDR", "unit": "dB", "better": "higher", "note": "", "digits": 1},
    {"key": "frechet", "title": "Fréchet distance", "unit": "", "better": "lower", "note": "", "digits": 1},
]
SPREAD = {"key": "spread", "title": "Spread", "unit": "dB", "better": "", "note": "", "digits": 2}


def make_run(
    folder: Path, *settings: str, better_by: float = 0.0, seed: int = 0, evaluated: bool = True, gone: str = ""
) -> Path:
    """Write a run with a trained stage, curves, and an evaluation whose z is `better_by` dB nearer in every clip.

    `gone` is the place of its sounds, which are not there any more.
    """
    config = load_recipe("tiny", [f"run_dir={folder}", *settings])
    if gone:
        config.data.audio = gone
    stage = folder / "autoencode"
    stage.mkdir(parents=True)
    for path in (folder, stage):
        (path / "config.yaml").write_text(to_yaml(config))
    (stage / "status.json").write_text(json.dumps({"state": "done", "samples": 64}))
    lines = [{"kind": "train", "samples": n, "loss": 2 / n, "samples_per_second": 100.0} for n in (16, 32, 48, 64)]
    lines += [{"kind": "held_out", "samples": n, "loss": 3 / n, "z_rank": 11} for n in (32, 64)]
    (stage / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if evaluated:
        write_evaluation(folder / "evaluate", better_by=better_by, seed=seed)
    return folder


def write_evaluation(folder: Path, *, better_by: float, seed: int) -> None:
    systems = [
        system("original", "Original", "original"),
        system("autoencoder", "AudioAE alone", "ceiling"),
        system("z", "Continuous z", "system", table="continuous"),
        system("zq1", "0.1 kbps", "system", table="ultra_low", payload_kbps=0.1),
    ]
    rng = np.random.default_rng(seed)
    spread = rng.normal(size=CLIPS)
    noise = np.random.default_rng(seed + int(1000 * better_by)).normal(size=CLIPS) / 100
    results = {
        "autoencoder": {"log_mel": of_clips(1 + abs(spread))},
        "z": {
            "log_mel": of_clips(5 + spread - better_by + (noise if better_by else 0)),
            "si_sdr": of_clips(-3 - spread),
            "frechet": {"mean": 20.0 - better_by, "std": None, "ci": [15.0, 25.0]},
        },
        "zq1": {"log_mel": of_clips(np.where(np.arange(CLIPS) == 3, np.nan, 6 + spread))},
    }
    report = {
        "recipe": "tiny", "model_hash": "a91f03", "created": "2026-11-29", "subtitle": "A trial.",
        "sample_rate": 48_000, "systems": systems, "tables": {}, "figures": FIGURES, "embedding": "mel-stat",
        "confidence": 0.95, "results": results, "variability": {"decodes": 1, "systems": [], "figure": SPREAD},
        "clips": [clip(folder, key, systems, seed=seed) for key in ("bell", "wind")],
        "speed": {"encode_realtime_factor": 30.1, "decode_realtime_factor": 4.2, "steps": 4, "device": "CPU"},
        "curve": None, "identity": "0",
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(report))


def system(key: str, title: str, role: str, **given: object) -> dict:
    empty = {"detail": "", "note": "", "payload_kbps": None, "file_kbps": None, "coded_kbps": None, "page": True}
    return {"key": key, "title": title, "role": role, "table": "", "licence": "", "unavailable": "", **empty, **given}


def of_clips(values: np.ndarray) -> dict:
    finite = values[np.isfinite(values)]
    listed = [None if np.isnan(value) else float(value) for value in values]
    return {"mean": float(finite.mean()), "std": float(finite.std()), "ci": None, "clips": listed}


def clip(folder: Path, key: str, systems: list[dict], *, seed: int) -> dict:
    audio = {}
    for number, each in enumerate(systems):
        source = f"audio/{each['key']}/{key}.0.flac"
        path = folder / source
        path.parent.mkdir(parents=True, exist_ok=True)
        sound = np.random.default_rng([seed, number, len(key)]).normal(size=2400) / 10
        soundfile.write(path, sound, 48_000)
        audio[each["key"]] = [source]
    return {"key": key, "caption": f"a {key}", "seconds": 0.05, "audio": audio}


def test_only_what_differs_is_listed_and_a_runs_own_folder_is_no_difference(tmp_path: Path):
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", "autoencode.lr=1e-3", "parallel.threads=3", gone=f"{tmp_path}/b/sounds")
    compared = compare([a, b])
    assert [(each.key, *each.texts) for each in compared.settings] == [
        ("data.audio", "null", "RUN/sounds"),
        ("autoencode.lr", "0.0003", "0.001"),
        ("parallel.threads", "null", "3"),
    ]


def test_the_settings_of_a_stage_are_those_with_which_it_was_trained(tmp_path: Path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "autoencode.lr=1e-3")
    (b / "config.yaml").write_text((a / "config.yaml").read_text())
    assert [each.key for each in compare([a, b]).settings] == ["autoencode.lr"]


def test_no_secret_is_compared(tmp_path: Path):
    a = make_run(tmp_path / "a", gone="https://me:letmein@there/sounds")
    b = make_run(tmp_path / "b", "log.notify=https://hook/opensesame", gone="https://me:letmein@here/sounds")
    compared = compare([a, b])
    assert "data.audio" in [each.key for each in compared.settings]
    write_comparison(compared, tmp_path / "out")
    shown = tables.text(compared) + "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.is_file())
    assert "letmein" not in shown
    assert "opensesame" not in shown


def test_a_difference_that_every_clip_shows_is_found_though_the_intervals_of_the_means_overlap(tmp_path: Path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", better_by=0.1)
    compared = compare([a, b])
    found = {(each.system, each.figure): each for each in compared.differences}
    log_mel = found["z", "log_mel"]
    assert log_mel.value == pytest.approx(-0.1, abs=0.01)
    assert log_mel.significant
    assert log_mel.better
    assert not found["z", "si_sdr"].significant
    assert found["zq1", "log_mel"].value == 0  # a clip that failed is left out
    assert ("z", "frechet") not in found  # one number for all clips has no pairs
    assert "-0.0999 better [" in tables.text(compared)


def test_the_best_of_all_runs_is_marked_and_those_that_do_not_differ(tmp_path: Path):
    runs = [make_run(tmp_path / name, better_by=by) for name, by in (("a", 0.0), ("b", 0.5), ("c", 0.5))]
    merged = compare(runs).merged
    assert merged is not None
    log_mel = {key: result["log_mel"] for key, result in merged.report["results"].items() if key.endswith(":z")}
    assert log_mel["0:z"]["significant"]
    assert log_mel["1:z"]["best"]
    assert log_mel["2:z"]["significant"] is False


def test_what_is_the_same_in_all_runs_stands_once(tmp_path: Path):
    merged = compare([make_run(tmp_path / "a"), make_run(tmp_path / "b", better_by=0.1)]).merged
    assert merged is not None
    assert [each["title"] for each in merged.report["systems"]] == [
        "Original", "AudioAE alone", "a · Continuous z", "b · Continuous z", "a · 0.1 kbps", "b · 0.1 kbps",
    ]  # fmt: skip


def test_runs_that_were_scored_on_other_clips_are_shown_but_not_tested(tmp_path: Path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=5)
    compared = compare([a, b])
    assert compared.merged is not None
    assert compared.differences == []
    assert "The runs were scored on different clips" in tables.text(compared)
    clips = {each["key"]: each["audio"] for each in compared.merged.report["clips"]}
    assert set(clips) == {"0:bell", "0:wind", "1:bell", "1:wind"}
    assert set(clips["1:bell"]) == {"1:original", "1:autoencoder", "1:z", "1:zq1"}  # never beside a's original
    assert not any("significant" in r for of in compared.merged.report["results"].values() for r in of.values())


def test_figures_of_different_embeddings_are_left_out(tmp_path: Path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    path = b / "evaluate" / "evaluation.json"
    path.write_text(path.read_text().replace("mel-stat", "aisfx"))
    merged = compare([a, b]).merged
    assert merged is not None
    assert [figure["key"] for figure in merged.report["figures"]] == ["log_mel", "si_sdr"]
    assert "frechet" not in merged.report["results"]["0:z"]


def test_the_page_shows_the_sounds_of_all_runs_beside_each_other(tmp_path: Path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "autoencode.lr=1e-3", better_by=0.1)
    page = Page(write_comparison(compare([a, b]), tmp_path / "out"))
    assert all((tmp_path / "out" / file).is_file() for file in page.references())
    played = [each["data-title"] for each in page.section("continuous").find("div", "player")]
    assert played == ["Original", "AudioAE alone", "a · Continuous z", "b · Continuous z"] * 2
    assert "autoencode.lr" in page.texts("code")
    charts = [each["aria-label"] for each in page.section("training").find("svg")]
    assert charts == [
        "autoencode, training loss, at the end: a 0.0312; b 0.0312",
        "autoencode, held-out loss, at the end: a 0.0469; b 0.0469",
    ]


def test_runs_without_an_evaluation_are_compared_as_far_as_they_have_come(tmp_path: Path):
    a, b = (make_run(tmp_path / name, evaluated=False) for name in "ab")
    compared = compare([a, b])
    text = tables.text(compared)
    assert "a has no evaluation: `spresso evaluate` makes it." in text
    assert ["autoencode", "b", "done", "64", "0.04688", "11", "100"] in [line.split() for line in text.splitlines()]
    page = Page(write_comparison(compared, tmp_path / "out"))
    assert page.section("training").find("svg")
    assert "All settings are the same in all runs." in page.texts("p", "lead")


def test_hostile_names_are_text(tmp_path: Path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / HOSTILE.replace("/", "∕"), "seed=3", better_by=0.1)
    page = Page(write_comparison(compare([a, b]), tmp_path / "out"))
    assert len(page.find("script")) == 1
    assert not [each for each in page.find("img") if each["src"] == "x"]


@pytest.mark.parametrize("there", ["notes.txt", "index.html", "comparison.json"])
def test_a_folder_with_something_else_is_left_as_it_is(tmp_path: Path, there: str):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / there).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=there):
        write_comparison(compare(runs), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [there]
    assert (tmp_path / "out" / there).read_text() == '{"mine": 1}'


def test_a_comparison_is_replaced_whole_even_if_the_last_was_interrupted(tmp_path: Path):
    a, b, c = (make_run(tmp_path / name, better_by=by) for name, by in (("a", 0.0), ("b", 0.1), ("c", 0.2)))
    index = write_comparison(compare([a, b, c]), tmp_path / "out")
    index.unlink()  # a kill came before the page
    page = Page(write_comparison(compare([a, b]), tmp_path / "out"))
    kept = {f"{path.parent.name}/{path.name}" for path in (tmp_path / "out").glob("*/*")}
    assert kept == page.references()


def test_a_missing_recording_ends_the_command_before_the_older_page_goes(tmp_path: Path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", better_by=0.1)]
    index = write_comparison(compare(runs), tmp_path / "out")
    before = index.read_bytes()
    (tmp_path / "b/evaluate/audio/z/bell.0.flac").unlink()
    with pytest.raises(ValueError, match=r"bell\.0\.flac is missing: `spresso evaluate` makes it again"):
        write_comparison(compare(runs), tmp_path / "out")
    assert index.read_bytes() == before
    assert all((tmp_path / "out" / file).is_file() for file in Page(index).references())


def test_labels_are_the_shortest_ends_that_differ():
    assert labels([Path("/runs/a"), Path("/runs/b")]) == ["a", "b"]
    assert labels([Path("/x/lr/a"), Path("/y/lr/a"), Path("/y/lr/b")]) == ["x/lr/a", "y/lr/a", "y/lr/b"]


def test_the_command_prints_the_table_and_names_the_page(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b", "autoencode.lr=1e-3", better_by=0.1)
    assert main(["compare", "a", "b"]) == 0
    told = capsys.readouterr()
    assert "autoencode.lr  0.0003  0.001" in told.out
    assert f"open {tmp_path}/comparison/index.html" in told.err
    written = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert written["settings"] == {"autoencode.lr": [0.0003, 0.001]}
    assert (
        "| autoencode.lr | 0.0003 | 0.001 |".replace("_", r"\_") in (tmp_path / "comparison/comparison.md").read_text()
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["a"], "two runs or more"),
        (["a", "a"], "is named twice"),
        (["a", "empty"], "is no run"),
        (["a", "b"], "no run b"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, monkeypatch, capsys, given: list[str], told: str):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    assert main(["compare", *given]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "comparison").exists()


def test_a_browser_shows_the_page_without_a_complaint(tmp_path: Path):
    runs = [make_run(tmp_path / name, better_by=by) for name, by in (("a", 0.0), ("b", 0.1))]
    index = write_comparison(compare(runs), tmp_path / "out")
    with chromium(tmp_path / "profile") as browser:
        browser.open(index)
        for width in (1400, 400):
            browser.resize(width)
            assert browser.run("return document.documentElement.scrollWidth") <= width
        colours = browser.run(
            "return [...document.querySelectorAll('polyline.run')].map(e => getComputedStyle(e).stroke)"
        )
        assert len(set(colours)) == 2
        assert browser.errors() == []
