"""The page in windows of all widths: nothing is cut off, and figures that have no room there can be unfolded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.trainer.page.browser import Browser, chromium
from trainer.evaluate.embeddings import MelStatistics
from trainer.evaluate.scores import figures_of
from trainer.page import write_page

SIDE_BY_SIDE = {390: 3, 819: 3, 820: 4, 1000: 5, 1280: 8, 1400: 9}
"""Figures in the first line of a row, by the width of the window."""
TYPICAL = {
    "log_mel": 12.0, "mrstft": 3.5, "lsd": 8.0, "si_sdr": -40.0, "denoising": 0.6, "frechet": 1234.0, "kernel": -0.005,
    "retrieval": 90.0, "visqol": 3.6,
}  # fmt: skip
LONG = "S-PRESSO at 1 Hz, trained on recorded effects"
VISIBLE_CELLS = """
  const shown = (cell) => cell.checkVisibility() && cell.getBoundingClientRect().width > 0;
  const cells = [...document.querySelectorAll("#figures :is(th, td):not(.unfold)")].filter(shown);
"""
OVERHANG = """
  return cells.flatMap((cell) => {
    const text = document.createRange();
    text.selectNodeContents(cell);
    const [content, box] = [text.getBoundingClientRect(), cell.getBoundingClientRect()];
    const container = cell.closest("table").getBoundingClientRect();
    const cut = box.right > container.right || content.right > container.right || content.left < container.left;
    const overlaps = content.left < box.left - 1 || content.right > box.right + 8; // a mark is wider than its text
    return cut || overlaps ? [cell.textContent] : [];
  });
"""
SHOWN = """
  const named = (row) => row.querySelector("th").innerText.split("\\n")[0].replace("?", "").trim();
  const rows = [...document.querySelectorAll("#figures tbody tr:has(td:not(.reason, .rate))")];
  return Object.fromEntries(rows.map((row) => [
    named(row), [...row.cells].filter((cell) => cells.includes(cell) && /figure-/.test(cell.className)).length,
  ]));
"""
LINES = """
  const small = cells.flatMap((cell) => [...cell.querySelectorAll("td:not(.rate) small")]);
  return small.map((text) => text.getBoundingClientRect().height / parseFloat(getComputedStyle(text).lineHeight));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser") / "profile") as window:
        yield window


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("report")
    report = all_figures(root)
    return write_page(report, root / "page", audio_root=root, curves={}, config_text="seed: 1")


@pytest.fixture
def page(browser, index) -> Iterator[Browser]:
    browser.open(index)
    yield browser
    assert browser.errors() == []
    browser.command("Emulation.setEmulatedMedia", media="")
    browser.command("Emulation.clearDeviceMetricsOverride")


def all_figures(root: Path) -> dict:
    """Every figure that an evaluation has, with intervals, controls and marks; names of all lengths."""
    systems: list[dict] = [
        {"key": "original", "title": "Original", "role": "original"},
        {"key": "ae", "title": "AudioAE alone", "role": "ceiling", "note": "No codec is better."},
        {"key": "z", "title": "Continuous z", "role": "system", "detail": "11.1 Hz × 64, 68×"},
        {"key": "z1", "title": f"{LONG}, continuous z", "role": "system", "detail": "1.0 Hz × 64, 750×"},
        {
            "key": "vae", "title": "Stable Audio VAE", "role": "baseline", "licence": "Stability AI Community License",
            "unavailable": "the weights stabilityai/stable-audio-open-1.0 are not in the hub's cache",
        },
        {
            "key": "zq", "title": "1.3 kbps", "role": "system", "note": "A note.", "detail": "15 × 8 bits at 11.1 Hz",
            "payload_kbps": 1.333, "coded_kbps": 0.985, "file_kbps": 1.37,
        },
        {"key": "zq_before", "title": "1.3 kbps, before finetuning", "role": "system", "payload_kbps": 1.333},
        {"key": "opus", "title": "Opus, 6 kbps", "role": "baseline", "payload_kbps": 4.89, "licence": "BSD (libopus)"},
        {"key": "zq1", "title": f"{LONG}, 0.3 kbps", "role": "system", "payload_kbps": 0.3, "file_kbps": 0.331},
        {"key": "sem", "title": "SemantiCodec, 0.31 kbps", "role": "baseline", "payload_kbps": 0.31, "licence": "MIT"},
        {"key": "other", "title": "Another clip's z", "role": "floor", "note": "Of the next clip."},
    ]  # fmt: skip
    embedding = MelStatistics()
    embedding.name = "CLAP clap-htsat-unfused"
    figures = [dataclasses.asdict(figure) for figure in figures_of(embedding, clips=24, visqol=True)]
    heard = [system for system in systems if "unavailable" not in system]
    results = {
        system["key"]: {figure["key"]: result(figure["key"], n, system) for figure in figures}
        for n, system in enumerate(heard[1:])
    }
    captions = ("a bell rings", "sounds/voices_of_a_file_name_without_spaces.ogg")
    clips = [record(root, caption, [system["key"] for system in heard]) for caption in captions]
    return {
        "recipe": "r11", "sample_rate": 16_000,
        "systems": systems, "figures": figures, "results": results, "clips": clips,
    }  # fmt: skip


def result(key: str, n: int, system: dict) -> dict:
    """One as wide as that figure gets, a little worse for each further system."""
    mean = TYPICAL[key] * (1 - n / 100 if key == "visqol" else 1 + n / 100)
    told = {"control": 1.2 * mean} if system["role"] == "system" else {}
    return {"mean": mean, "ci": sorted([0.9 * mean, 1.1 * mean]), "significant": False, **told}


def record(root: Path, caption: str, systems: list[str]) -> dict:
    key, audio = caption[:6].replace("/", "-"), {}
    for system in systems:
        audio[system] = [f"{key}.{system}.{take}.flac" for take in range(5 if system.startswith("zq") else 1)]
        for name in audio[system]:
            soundfile.write(root / name, np.zeros(800), 16_000)
    return {"key": key, "caption": caption, "seconds": 0.05, "audio": audio}


def shown(page: Browser) -> dict[str, int]:
    """How many figures of each system are visible."""
    return page.run(VISIBLE_CELLS + SHOWN)


def focus_by_tab(page: Browser, selector: str) -> None:
    """Press Tab from the page's start until an element has the focus."""
    for _ in range(60):
        page.press("Tab")
        if page.run("return document.activeElement.matches(given[0])", selector):
            return
    pytest.fail(f"Tab never came to {selector}")


# ---- at every width


@pytest.mark.parametrize("unfolded", [False, True], ids=["folded", "unfolded"])
@pytest.mark.parametrize("width", [360, *SIDE_BY_SIDE])
def test_nothing_is_cut_off_and_the_page_does_not_scroll_sideways(page, width, unfolded):
    page.resize(width)
    page.run("document.querySelector('.unfold-all').open = given[0]", unfolded)
    wide, room = page.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert width - 20 < wide <= room == width
    assert page.run(VISIBLE_CELLS + OVERHANG) == []
    beyond = """
      const parts = [...document.querySelectorAll(".player, .clips :is(th, td), .tile")];
      return parts.filter((part) => part.getBoundingClientRect().right > innerWidth).length;
    """
    assert page.run(beyond) == 0


@pytest.mark.parametrize(("width", "lines"), [(390, 5), (1000, 2), (1400, 1)])
def test_the_systems_of_a_clip_stand_in_as_few_lines_as_have_room_for_them(page, width, lines):
    page.resize(width)
    tops = "return [...document.querySelectorAll('#low [data-clip] td')].slice(0, 5).map((td) => td.offsetTop)"
    assert len(set(page.run(tops))) == lines


@pytest.mark.parametrize(("width", "figures"), SIDE_BY_SIDE.items())
def test_the_first_figures_are_shown_and_all_of_them_once_unfolded(page, width, figures):
    page.resize(width)
    assert set(shown(page).values()) == {figures}
    heads = page.run(VISIBLE_CELLS + "return cells.filter((c) => c.closest('thead')).map((c) => c.innerText)")
    assert [head.split("?")[0].strip() for head in heads[:4]] == [
        "System", "Bit rate", "Log-mel distance", "Multi-resolution STFT",
    ]  # fmt: skip
    assert len(heads) == 2 + figures
    if figures < 9:
        page.click(".unfold-all summary")
    assert set(shown(page).values()) == {9}
    assert page.run("return document.querySelector('.unfold-all').checkVisibility()") == (figures < 9)


@pytest.mark.parametrize("width", SIDE_BY_SIDE)
def test_intervals_controls_and_marks_stand_in_the_first_figures(page, width):
    page.resize(width)
    text = "return document.querySelector(`#figures tr:has([aria-label$='of ${given[0]}']) .figure-1`).innerText"
    assert page.run(text, "Continuous z").split() == ["12.12", "[10.91,", "13.33]", "(14.54)"]
    assert page.run(text, "SemantiCodec, 0.31 kbps").split() == ["≈12.84", "[11.56,", "14.12]"]
    best = "return [...document.querySelectorAll('#figures .figure-1 strong')].map((e) => e.checkVisibility())"
    assert page.run(best) == [True, True, True]
    rate = "return document.querySelector('#figures .role-system td.rate:not(.nothing)').innerText.split('\\n')"
    assert page.run(rate) == ["1.33", "0.985 entropy\N{NON-BREAKING HYPHEN}coded", "1.37 in files"]


@pytest.mark.parametrize("width", SIDE_BY_SIDE)
def test_an_interval_takes_one_line(page, width):
    page.resize(width)
    page.run("document.querySelector('.unfold-all').open = true")
    found = page.run(VISIBLE_CELLS + LINES)
    assert len(found) == 9 * (9 + 5)  # intervals of all, controls of the systems
    assert max(found) == pytest.approx(1, abs=0.1)


# ---- unfolding


@pytest.mark.parametrize("key", ["Enter", " "])
@pytest.mark.parametrize("width", [390, 1000])
def test_the_keyboard_unfolds_and_folds_all_systems(page, width, key):
    page.resize(width, 6000)  # players in sight, which space must not start
    focus_by_tab(page, ".unfold-all summary")
    page.press(key)
    assert set(shown(page).values()) == {9}
    page.press(key)
    assert set(shown(page).values()) == {SIDE_BY_SIDE[width]}
    assert page.run("return document.querySelector('.current')") is None


@pytest.mark.parametrize("width", [390, 1000])
def test_one_system_is_unfolded_by_its_name_and_by_the_keyboard(page, width):
    page.resize(width)
    page.click("#figures .role-system tr:nth-child(2) summary")
    assert [name for name, figures in shown(page).items() if figures == 9] == ["Continuous z"]
    focus_by_tab(page, "#figures .role-system tr:nth-child(3) summary")
    page.press("Enter")
    unfolded = {"Continuous z", f"{LONG}, continuous z"}
    assert {name for name, figures in shown(page).items() if figures == 9} == unfolded
    assert set(shown(page).values()) == {9, SIDE_BY_SIDE[width]}
    assert page.run(VISIBLE_CELLS + OVERHANG) == []


def test_a_note_is_shown_and_does_not_unfold_its_system(page):
    page.resize(390)
    page.click("#figures .role-ceiling .hint")
    assert page.run("return document.querySelector('.tip').textContent") == "No codec is better."
    assert set(shown(page).values()) == {3}


@pytest.mark.parametrize("width", [390, 1000])
def test_what_stands_in_a_further_line_is_labelled(page, width):
    page.resize(width)
    page.click(".unfold-all summary")
    labels = page.run("""
      const cells = [...document.querySelector("#figures .role-system tr:nth-child(2)").cells];
      const label = (cell) => getComputedStyle(cell, "::before");
      return cells.filter((cell) => label(cell).display === "block").map((cell) => cell.dataset.label);
    """)
    assert labels[-2:] == [
        "Retrieval (CLAP clap-htsat-unfused), %\N{NO-BREAK SPACE}↑",
        "ViSQOL, MOS-LQO\N{NO-BREAK SPACE}↑",
    ]
    assert len(labels) == (10 if width == 390 else 4)  # on a phone the first line and the rate, too


def test_without_scripts_the_first_figures_are_there_and_unfold(browser, index):
    browser.command("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(index)
    browser.resize(390)
    browser.click(".unfold-all summary")
    assert set(shown(browser).values()) == {9}
    browser.command("Emulation.setScriptExecutionDisabled", value=False)


def test_on_paper_nothing_is_folded(page):
    page.resize(718)
    page.command("Emulation.setEmulatedMedia", media="print")
    assert set(shown(page).values()) == {9}
    toggles = "return [...document.querySelectorAll('#figures summary')].map((e) => e.checkVisibility())"
    assert set(page.run(toggles)) == {False}
    assert page.run(VISIBLE_CELLS + OVERHANG) == []


def test_two_figures_have_nothing_to_unfold(browser, tmp_path):
    report = all_figures(tmp_path)
    report["figures"] = report["figures"][:2]
    browser.open(write_page(report, tmp_path / "page", audio_root=tmp_path, curves={}, config_text=""))
    for width in (360, 390, 1400):
        browser.resize(width)
        assert set(shown(browser).values()) == {2}
        assert browser.run(VISIBLE_CELLS + OVERHANG) == []
    assert browser.run("return document.querySelectorAll('#figures summary').length") == 0
