"""The page of a comparison: settings, figures, curves, and the sounds of the runs beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.atomic_write import write_whole
from models.documents import damaged, read_json, write_json
from trainer.compare import charts, tables
from trainer.compare.comparison import Comparison
from trainer.compare.figures import PairedDifference, key_in
from trainer.evaluate.systems import EvaluationReport
from trainer.page import clear_page, figure_table, footer, listening, read_assets
from trainer.page.html import NOTHING, Html, count, document, element, section, signed
from trainer.page.recordings import Takes, gather_takes, require_recordings

_DOCUMENT = "comparison.json"
_NAMES = {_DOCUMENT, "comparison.md", "index.html", "audio", "images"}


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write the page, `comparison.md` and `comparison.json` into a folder; return the path of index.html.

    Raises:
        ValueError: the folder holds something that no comparison wrote, or a recording is missing or damaged.
        OSError: a file can't be read or written now.
    """
    _require_own(folder)
    for report, root in _parts(comparison):
        require_recordings(report, root)  # before anything of an older page goes
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _DOCUMENT, comparison.document, indent=2)  # first: it shows that the folder is a comparison's
    clear_page(folder, by="spresso compare", mend="give another --out")
    takes: dict[tuple[str, str], Any] = {}
    for report, root in _parts(comparison):
        takes |= gather_takes(report, folder, root)
    write_whole(folder / "comparison.md", tables.markdown(comparison))
    index = folder / "index.html"
    write_whole(index, _page(comparison, takes))
    return index


def _require_own(folder: Path) -> None:
    """Raise ValueError if a folder has content, but is not that of a comparison."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give another --out")
    found = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if not found:
        return
    foreign = sorted(set(found) - _NAMES)
    if foreign or _DOCUMENT not in found:
        raise ValueError(
            f"{folder / (foreign or found)[0]} was not written by `spresso compare`: give a new folder as --out"
        )
    mend = "remove it, if the folder is a comparison's"
    if "differences" not in read_json(folder / _DOCUMENT, dict[str, Any], mend=mend):
        raise damaged(folder / _DOCUMENT, "it is no comparison", mend)


def _parts(comparison: Comparison) -> list[tuple[EvaluationReport, Path]]:
    """Return the merged report for each run with the recordings of this run alone, and the folder where they lie."""
    if comparison.merged is None:
        return []
    report = comparison.merged.report
    parts: list[tuple[EvaluationReport, Path]] = []
    for number, run in enumerate(comparison.runs):
        clips = [{**clip, "audio": _of_run(clip["audio"], number)} for clip in report["clips"]]
        parts.append(({**report, "clips": clips}, run.evaluation))
    return parts


def _of_run(audio: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return the first recording of each system of run `number`; further decodes are on the run's own page."""
    return {key: files[:1] for key, files in audio.items() if key.startswith(key_in(number, ""))}


# ---- sections


def _page(comparison: Comparison, takes: Takes) -> str:
    parts = [
        ("settings", "Settings", _settings(comparison)),
        ("stages", "Stages", _stages(comparison)),
        *_scored(comparison, takes),
        ("training", "Training", _training(comparison)),
    ]
    shown = [(anchor, title, part) for anchor, title, part in parts if part]
    report: EvaluationReport = comparison.merged.report if comparison.merged else {"systems": [], "figures": []}
    head = _header(comparison, [(anchor, title) for anchor, title, _ in shown])
    sheet = read_assets("page.css", "players.css", "compare.css")
    return document(
        f"{', '.join(run.label for run in comparison.runs)} · S-PRESSO",
        [head, *(part for _, _, part in shown), footer(), listening.bar()],
        style=sheet + figure_table.style(report) + listening.style(report, takes),
        script=read_assets("deck.js", "page.js"),
        data_sample_rate=report.get("sample_rate", 48_000),
    )


def _header(comparison: Comparison, contents: list[tuple[str, str]]) -> Html:
    runs = [
        element("li", run.label, class_="run", style=charts.style(number)) for number, run in enumerate(comparison.runs)
    ]
    links = [element("a", title, href=f"#{anchor}") for anchor, title in contents]
    return element(
        "header",
        element("p", "S-PRESSO · comparison", class_="overline"),
        element("h1", count(len(comparison.runs), "run")),
        element("ul", *runs, class_="facts runs"),
        *(element("p", note, class_="lead") for note in comparison.notes),
        element("nav", *links, class_="contents", aria_label="Sections of the page"),
        class_="measure",
    )


def _settings(comparison: Comparison) -> Html:
    lead = "These settings are not the same in all runs."
    if any("RUN" in text for each in comparison.settings for text in each.texts):
        lead += " RUN is the directory of the run."
    if not comparison.settings:
        return section("Settings", "All settings are the same in all runs.", id="settings")
    head = ["Setting", *(run.label for run in comparison.runs)]
    rows = [[element("code", each.key), *each.texts] for each in comparison.settings]
    return section("Settings", lead, _table(head, rows), id="settings")


def _stages(comparison: Comparison) -> Html | None:
    rows = tables.stage_rows(comparison)
    lead = "How far each trained stage has come. The directions of z are those that hold 99 % of its variance."
    head = ["Stage", "Run", *(title[0].upper() + title[1:] for title in tables.STAGE_HEAD)]
    return section("Stages", lead, _table(head, rows), id="stages") if rows else None


def _scored(comparison: Comparison, takes: Takes) -> list[tuple[str, str, Html | None]]:
    """Return the sections that the evaluations fill: figures, differences, rates, and sounds."""
    if comparison.merged is None:
        return []
    report = comparison.merged.report
    figures = section("Figures", figure_table.lead(report), figure_table.figure_table(report), id="figures")
    return [
        ("figures", "Figures", figures),
        ("differences", "Differences", _differences(comparison)),
        ("bits", "Bits", _bits(comparison)),
        *listening.sections(report, takes),
    ]


def _differences(comparison: Comparison) -> Html | None:
    if not comparison.differences:
        return None
    lead = (
        f"How each run differs from {comparison.first_evaluated}: this run minus {comparison.first_evaluated}, paired "
        "over the clips, with the 95 % interval. A run is called better or worse where this interval excludes zero."
    )
    figures, rows = comparison.difference_rows(_difference)
    head = ["System", "Run", *(", ".join(filter(None, [figure["title"], figure["unit"]])) for figure in figures)]
    return section("Differences", lead, _table(head, rows), id="differences")


def _difference(difference: PairedDifference | None) -> Html:
    """Return a difference with its interval below; one whose interval excludes zero is strong and judged in a word."""
    if difference is None:
        return element("span", NOTHING)
    text = signed(difference.value, 3)
    value: object = text
    if difference.significant:
        value = element("strong", f"{text} {'better' if difference.better else 'worse'}")
    bounds = difference.interval and f"[{', '.join(signed(bound, 3) for bound in difference.interval)}]"
    return element("span", value, element("small", bounds) if bounds else None)


def _bits(comparison: Comparison) -> Html | None:
    drawn = charts.rate_chart(comparison)
    if drawn is None:
        return None
    lead = "How near decodes come to the original with the first codebooks alone, over the clips of this page."
    figure = element("div", element("div", drawn, class_="bits"), class_="measure")
    return section("What a bit is worth", lead, figure, id="bits")


def _training(comparison: Comparison) -> Html | None:
    drawn = charts.loss_charts(comparison)
    if not drawn:
        return None
    lead = "The number beside a run's name is where its curve ends."
    return section("Training", lead, element("div", *drawn, class_="charts measure"), id="training")


def _table(head: list[str], rows: list[list[Any]]) -> Html:
    """Return a table that scrolls sideways in a narrow window."""
    heading = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in cells))
        for first, *cells in rows
    ]
    table = element("table", element("thead", heading), element("tbody", *body), class_="compared")
    name = f"Table by {head[0].lower()}"
    return element("div", table, class_="scrolled measure", tabindex="0", role="region", aria_label=name)
