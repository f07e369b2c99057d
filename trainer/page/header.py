"""The head of the page: title, facts, key numbers as tiles, and links to the sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.page.figure_table import best_of, means_of
from trainer.page.html import Html, count, element, join, signed
from trainer.page.system_cells import EvaluationReport, played, with_role


def header(report: EvaluationReport, contents: Sequence[tuple[str, str]]) -> Html:
    """Return the head of the page; `contents` holds anchor and title of each section."""
    rate = f"{report['sample_rate'] / 1000:g} kHz"
    facts = [report.get("created"), rate, count(len(report["clips"]), "clip")]
    if report.get("model_hash"):
        facts.append(join(["model ", element("code", report["model_hash"][:8])]))
    items = [element("li", fact) for fact in facts if fact]
    links = [element("a", title, href=f"#{anchor}") for anchor, title in contents]
    return element(
        "header",
        element("p", "S-PRESSO · listening page", class_="overline"),
        element("h1", report["recipe"]),
        element("p", report.get("subtitle"), class_="subtitle") if report.get("subtitle") else None,
        element("ul", *items, class_="facts"),
        element("div", *_tiles(report), class_="tiles"),
        element("nav", *links, class_="contents", aria_label="Sections of the page"),
        class_="measure",
    )


def _tiles(report: EvaluationReport) -> list[Html]:
    tiles = [_rate_tile(report), _headline_tile(report), *_speed_tiles(report.get("speed") or {})]
    return [tile for tile in tiles if tile]


def _tile(label: str, value: str, unit: str, detail: str) -> Html:
    number = element("p", value, element("small", unit) if unit else None, class_="value")
    lines = [element("p", label, class_="label"), number, element("p", detail, class_="detail")]
    return element("div", *lines, class_="tile")


def _rate_tile(report: EvaluationReport) -> Html | None:
    rates = sorted({system["payload_kbps"] for system in with_role(report, "system") if system.get("payload_kbps")})
    if not rates:
        return None
    channels = report.get("channels", 1)  # reports of older versions are of mono clips
    pcm = channels * report["sample_rate"] * 16 / 1000
    ends = [rates[0], rates[-1]] if len(rates) > 1 else rates
    factors = " to ".join(f"{pcm / rate:,.0f}" for rate in reversed(ends))
    value = "–".join(f"{rate:.2g}" for rate in ends)
    return _tile(
        "Bit rate", value, "kbps", f"{factors} times less than 16-bit {'stereo' if channels == 2 else 'mono'} PCM"
    )


def _headline_tile(report: EvaluationReport) -> Html | None:
    """Return the first figure of the best quantized system that the page plays (or of the best), with its bounds."""
    if not report["figures"]:
        return None
    figure = report["figures"][0]
    means = means_of(report, figure)
    systems = [system for system in with_role(report, "system") if system["key"] in means]
    heard = played(report)
    rivals = [system for system in systems if system.get("payload_kbps") and system["key"] in heard] or systems
    if not rivals:
        return None
    best = best_of(figure)(rivals, key=lambda system: means[system["key"]])
    bounds = [s for role in ("ceiling", "floor") for s in with_role(report, role) if s["key"] in means]
    others = [f"{system['title']} {signed(means[system['key']], 1)}" for system in bounds]
    detail = " · ".join([best["title"], *others])
    return _tile(figure["title"], signed(means[best["key"]], 1), figure["unit"], detail)


def _speed_tiles(speed: Mapping[str, Any]) -> list[Html]:
    steps = count(speed["steps"], "step") if speed.get("steps") else None
    device = speed.get("device")
    tiles = []
    for name, notes in (("encode", [device]), ("decode", [steps, device])):
        factor = speed.get(f"{name}_realtime_factor")
        if factor is not None:
            detail = " · ".join(note for note in notes if note)
            tiles.append(_tile(name.capitalize(), f"{factor:.3g}×", "real time", detail))
    return tiles
