"""Writes the listening page: one static folder in which to hear, see and compare the decodes of codecs.

The page opens from disk by a double click and needs neither a server nor a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.atomic_write import write_whole
from trainer.page import figure_table, listening
from trainer.page.bit_chart import bits_section
from trainer.page.curves import loss_chart, read_curve
from trainer.page.header import header
from trainer.page.html import Html, document, element, section
from trainer.page.recordings import foreign_recordings, gather_takes, remove_recordings
from trainer.page.system_cells import ROLES, EvaluationReport

_ASSETS = Path(__file__).with_name("assets")
_STYLES = ("page.css", "players.css")
_SCRIPTS = ("deck.js", "page.js")
_REQUIRED = ("recipe", "sample_rate", "systems", "figures", "results", "clips")
_PAPER = "https://arxiv.org/abs/2602.15082"


def write_page(
    report: Mapping[str, Any],
    folder: Path,
    *,
    audio_root: Path,
    curves: Mapping[str, Path],
    config_text: str,
) -> Path:
    """Write index.html, audio/ and images/ into `folder` and return the path of index.html.

    Args:
        report: the report of an evaluation.
        folder: the page's folder.
        audio_root: folder to which the report's audio paths are relative; the audio files are used unchanged.
        curves: path of metrics.jsonl by stage.
        config_text: the config as the page shows it.

    Raises:
        ValueError: the report is incomplete, or audio is missing or damaged.
        OSError: audio can't be read now.
    """
    _require_complete(report)
    takes = gather_takes(report, folder, audio_root)
    parts = [
        ("figures", "Figures", _figures_section(report)),
        ("bits", "Bits", bits_section(report)),
        *listening.sections(report, takes),
        ("training", "Training", _training_section(curves)),
        ("config", "Config", _config_section(config_text)),
    ]
    shown = [(anchor, title, part) for anchor, title, part in parts if part]
    head = header(report, [(anchor, title) for anchor, title, _ in shown])
    index = folder / "index.html"
    text = document(
        f"{report['recipe']} · S-PRESSO",
        [head, *(part for _, _, part in shown), footer(), listening.bar()],
        style=read_assets(*_STYLES) + figure_table.style(report) + listening.style(report, takes),
        script=read_assets(*_SCRIPTS),
        data_sample_rate=report["sample_rate"],
    )
    write_whole(index, text)
    return index


def clear_page(folder: Path, *, by: str = "spresso page", mend: str = "set another run_dir=…") -> None:
    """Remove the recordings of an older page from its folder; `by` is the command that writes there.

    Raises:
        ValueError: the folder holds an index.html, or recordings, that no page wrote.
    """
    index = folder / "index.html"
    foreign = [index] if index.exists() and _PAPER not in index.read_text("utf-8", errors="replace") else []
    if foreign := [*foreign, *foreign_recordings(folder)]:
        raise ValueError(f"{foreign[0]} was not written by `{by}`, which would replace it: move it away, or {mend}")
    remove_recordings(folder)


def _require_complete(report: EvaluationReport) -> None:
    missing = [key for key in _REQUIRED if key not in report]
    if missing:
        raise ValueError(f"the report lacks {', '.join(missing)}: write it again with `spresso evaluate`")
    for system in report["systems"]:
        if system.get("role") not in ROLES:
            raise ValueError(
                f"system {system['key']!r} has an unknown role, not one of {', '.join(ROLES)}: run `spresso evaluate`"
            )


def read_assets(*names: str) -> str:
    """Return the text of styles or scripts of the page, one after the other."""
    return "".join((_ASSETS / name).read_text(encoding="utf-8") for name in names)


# ---- sections


def _figures_section(report: EvaluationReport) -> Html:
    return section("Figures", figure_table.lead(report), figure_table.figure_table(report), id="figures")


def _training_section(curves: Mapping[str, Path]) -> Html | None:
    charts = [chart for stage, path in curves.items() if (chart := loss_chart(stage, read_curve(path)))]
    if not charts:
        return None
    lead = "Each chart shows the loss of a stage over the samples seen. The faint lines are losses at each noise level."
    return section("Training", lead, element("div", *charts, class_="charts measure"), id="training")


def _config_section(config_text: str) -> Html:
    config = element("pre", config_text, tabindex="0")
    details = element("details", element("summary", "Config"), config, class_="measure")
    return element("section", details, id="config")


def footer() -> Html:
    """Return the foot of the page."""
    paper = element("a", "arXiv 2602.15082", href=_PAPER)
    return element("footer", "The codec follows the S-PRESSO paper, ", paper, ".", class_="measure")
