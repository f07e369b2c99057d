"""The listening page's HTML from an evaluation's report: pure functions from data to text.

All of it is built by `element`, which escapes whatever is not `Html` already: no caption, title or note can get out of
its place, and no caller has to remember it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Report = Mapping[str, Any]
System = Mapping[str, Any]
FigureInfo = Mapping[str, Any]

_PHONE_WIDTH = 700  # up to here a clip is a card, as page.css has it too
_VOID = {"img", "input", "meta"}
ROLES = {
    "original": "Original",
    "ceiling": "Ceiling: the best that a codec built on it can do",
    "system": "Systems",
    "floor": "Floors: what ignores the clip",
}
_NOTHING = "—"


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


@dataclass(frozen=True)
class Take:
    """One recording of a clip, its files relative to the page."""

    audio: str
    image: str
    seconds: float


def element(tag: str, *children: object, **attributes: object) -> Html:
    """`<tag …>children</tag>`, everything escaped that is not `Html`.

    Attribute names lose a trailing underscore and have hyphens for the others (`class_`, `aria_label`). None leaves an
    attribute out.
    """
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    opening = "".join(f' {name}="{html.escape(str(value))}"' for name, value in given.items())
    if tag in _VOID:
        return Html(f"<{tag}{opening}>")
    return Html(f"<{tag}{opening}>{join(children)}</{tag}>")


def join(children: Iterable[object]) -> Html:
    """Children one after another; None leaves nothing."""
    texts = (child if isinstance(child, Html) else html.escape(str(child)) for child in children if child is not None)
    return Html("".join(texts))


def document(title: str, body: Iterable[object], *, style: str, script: str) -> str:
    """A whole page that needs no other file but what its elements name."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style)),
    )
    page = element("html", head, element("body", *body, element("script", Html(script))), lang="en")
    return f"<!doctype html>\n{page}\n"


def section(title: str, lead: str, *children: object) -> Html:
    """A part of the page under its heading."""
    heading = element("div", element("h2", title), element("p", lead, class_="lead"), class_="measure")
    return element("section", heading, *children)


# ---- head of the page


def header(report: Report) -> Html:
    """What this is, and the key numbers as tiles."""
    rate = f"{report['sample_rate'] / 1000:g} kHz"
    facts = [report.get("created"), rate, _count(len(report["clips"]), "clip")]
    if report.get("model_hash"):
        facts.append(join(["model ", element("code", report["model_hash"][:8])]))
    items = [element("li", fact) for fact in facts if fact]
    return element(
        "header",
        element("p", "S-PRESSO · listening page", class_="overline"),
        element("h1", report["recipe"]),
        element("p", report.get("subtitle"), class_="subtitle") if report.get("subtitle") else None,
        element("ul", *items, class_="facts"),
        element("div", *_tiles(report), class_="tiles"),
        class_="measure",
    )


def _tiles(report: Report) -> list[Html]:
    tiles = [_rate_tile(report), _headline_tile(report), *_speed_tiles(report.get("speed") or {})]
    return [tile for tile in tiles if tile]


def _tile(label: str, value: str, unit: str, detail: str) -> Html:
    number = element("p", value, element("small", unit) if unit else None, class_="value")
    lines = [element("p", label, class_="label"), number, element("p", detail, class_="detail")]
    return element("div", *lines, class_="tile")


def _rate_tile(report: Report) -> Html | None:
    rates = sorted({system["payload_kbps"] for system in report["systems"] if system.get("payload_kbps")})
    if not rates:
        return None
    pcm = report["sample_rate"] * 16 / 1000
    ends = [rates[0], rates[-1]] if len(rates) > 1 else rates
    factors = " to ".join(f"{pcm / rate:,.0f}" for rate in reversed(ends))
    value = "–".join(f"{rate:.2g}" for rate in ends)
    return _tile("Bit rate", value, "kbps", f"{factors} times less than 16-bit mono PCM")


def _headline_tile(report: Report) -> Html | None:
    """The first figure of the best quantized system (else of the best system), between its ceiling and its floors."""
    if not report["figures"]:
        return None
    figure = report["figures"][0]
    means = _means(report, figure)
    systems = [system for system in report["systems"] if system["role"] == "system" and system["key"] in means]
    rivals = [system for system in systems if system.get("payload_kbps")] or systems
    if not rivals:
        return None
    best = _choose(figure)(rivals, key=lambda system: means[system["key"]])
    bounds = [s for s in report["systems"] if s["role"] in ("ceiling", "floor") and s["key"] in means]
    others = [f"{system['title']} {_signed(means[system['key']], 1)}" for system in bounds]
    detail = " · ".join([best["title"], *others])
    return _tile(figure["title"], _signed(means[best["key"]], 1), figure["unit"], detail)


def _speed_tiles(speed: Mapping[str, Any]) -> list[Html]:
    steps = _count(speed["steps"], "step") if speed.get("steps") else None
    device = speed.get("device")
    tiles = []
    for name, notes in (("encode", [device]), ("decode", [steps, device])):
        factor = speed.get(f"{name}_realtime_factor")
        if factor is not None:
            detail = " · ".join(note for note in notes if note)
            tiles.append(_tile(name.capitalize(), f"{factor:.3g}×", "real time", detail))
    return tiles


# ---- table of figures


def figure_table(report: Report) -> Html:
    """A row a system in the order of their roles, a column a figure; the best of the systems marked."""
    with_rate = any(system.get("payload_kbps") for system in report["systems"])
    columns = [element("th", "System", scope="col")]
    if with_rate:
        rate_note = "Of the codes alone; beneath it what the files take, measured by their sizes, headers and all."
        columns.append(element("th", _heading("Bit rate", "kbps", rate_note), scope="col"))
    for figure in report["figures"]:
        unit = " ".join(filter(None, [figure["unit"], "↓" if figure["better"] == "lower" else "↑"]))
        note = f"{figure['better'].capitalize()} is better. {figure.get('note') or ''}".strip()
        columns.append(element("th", _heading(figure["title"], unit, note), scope="col"))
    bodies = [_figure_rows(report, role, width=len(columns), with_rate=with_rate) for role in ROLES]
    table = element("table", element("thead", element("tr", *columns)), *bodies, class_="figures")
    return element("div", table, class_="scroll measure", tabindex="0", role="region", aria_label="Table of figures")


def _figure_rows(report: Report, role: str, *, width: int, with_rate: bool) -> Html | None:
    systems = [s for s in report["systems"] if s["role"] == role and report["results"].get(s["key"])]
    if not systems:
        return None
    rows = [element("tr", element("th", ROLES[role], colspan=width, scope="rowgroup"), class_="role")]
    for system in systems:
        cells = [element("th", _system_name(system), scope="row")]
        if with_rate:
            cells.append(_rate_cell(system))
        cells += [_figure_cell(report, system, figure) for figure in report["figures"]]
        rows.append(element("tr", *cells))
    return element("tbody", *rows, class_=f"role-{role}")


def _rate_cell(system: System) -> Html:
    if not system.get("payload_kbps"):
        return _empty_cell()
    measured = element("small", f"{system['file_kbps']:.3g} in files") if system.get("file_kbps") else None
    return element("td", f"{system['payload_kbps']:.3g}", measured)


def _figure_cell(report: Report, system: System, figure: FigureInfo) -> Html:
    means = _means(report, figure)
    if system["key"] not in means:
        return _empty_cell()
    mean, digits = means[system["key"]], figure.get("digits") or _digits(means.values())
    deviation = report["results"][system["key"]][figure["key"]].get("std")
    spread = element("small", f"± {_signed(deviation, digits)}") if _is_number(deviation) else None
    rivals = [means[s["key"]] for s in report["systems"] if s["role"] == "system" and s["key"] in means]
    is_best = system["role"] == "system" and len(rivals) > 1 and mean == _choose(figure)(rivals)
    value = element("strong", _signed(mean, digits), title="Best of the systems") if is_best else _signed(mean, digits)
    return element("td", value, spread)


def _heading(title: str, unit: str, note: str) -> Html:
    return join([_explained(title, note), element("small", unit)])


def _means(report: Report, figure: FigureInfo) -> dict[str, float]:
    """The means of a figure by system, without those that are missing or not finite."""
    means = {key: (results.get(figure["key"]) or {}).get("mean") for key, results in report["results"].items()}
    return {key: mean for key, mean in means.items() if _is_number(mean)}


def _choose(figure: FigureInfo) -> Callable[..., Any]:
    return min if figure["better"] == "lower" else max


def _digits(means: Iterable[float]) -> int:
    """Digits after the point, alike in a column: about three that count in its largest value."""
    largest = max(abs(mean) for mean in means)
    return 3 if largest < 1 else 2 if largest < 10 else 1 if largest < 1000 else 0


# ---- clips


def clip_grid(report: Report, takes: Mapping[tuple[str, str], Sequence[Take]]) -> Html:
    """A row a clip, a column a system. The original, which all is compared to, stays in sight beside the caption."""
    original = next((system for system in report["systems"] if system["role"] == "original"), None)
    others = played(report)
    columns = [element("th", original["title"] if original else "Clip", scope="col")]
    columns += [element("th", _system_name(system), scope="col", class_=f"role-{system['role']}") for system in others]
    rows = []
    for clip in report["clips"]:
        recordings = {system["key"]: takes.get((clip["key"], system["key"]), ()) for system in report["systems"]}
        caption = element("p", clip.get("caption") or clip["key"], class_="caption", dir="auto")
        seconds = element("p", f"{clip['seconds']:.1f} s", class_="seconds") if clip.get("seconds") else None
        heard = _recording(original, clip, recordings[original["key"]]) if original else None
        cells = [element("th", caption, seconds, heard, scope="row")]
        cells += [
            element("td", _recording(system, clip, recordings[system["key"]]), class_=f"role-{system['role']}")
            for system in others
        ]
        rows.append(element("tr", *cells))
    table = element("table", element("thead", element("tr", *columns)), element("tbody", *rows), class_="clips")
    return element("div", table, class_="scroll clips-scroll", tabindex="0", role="region", aria_label="Clips")


def played(report: Report) -> list[System]:
    """The systems beside the original of which there is sound; others stand in the table of figures alone."""
    with_sound = {key for clip in report["clips"] for key, files in clip["audio"].items() if files}
    return [s for s in report["systems"] if s["role"] != "original" and s["key"] in with_sound]


def clip_grid_style(report: Report) -> str:
    """The style that hangs on the number of systems: the width of the grid, and what a window with room for it adds.

    There nothing scrolls sideways, and so the head of the grid can stay in sight.
    """
    others = len(played(report))
    ample, needed = max(1120, 240 + 200 * others), max(_PHONE_WIDTH + 1, 304 + 160 * others)
    return (
        f".clips-scroll {{ width: min({ample}px, 100% - 2.5rem); }}\n"
        f"@media (min-width: {needed}px) {{ .clips-scroll {{ overflow: visible; }} "
        ".clips thead th { position: sticky; top: 0; z-index: 3; } .clips .name { display: none; } }\n"
    )


def _recording(system: System, clip: Mapping[str, Any], takes: Sequence[Take]) -> Html:
    name = element("p", system["title"], class_="name")
    return join([name, _player(system, clip, takes) if takes else element("span", _NOTHING, class_="nothing")])


def _player(system: System, clip: Mapping[str, Any], takes: Sequence[Take]) -> Html:
    first, what = takes[0], f"{system['title']}, {clip.get('caption') or clip['key']}"
    seek = element(
        "input", type="range", min="0", max=f"{first.seconds:.3f}", step="0.05", value="0",
        autocomplete="off", aria_label=f"Position in {what}",
    )  # fmt: skip
    picture = element("img", src=first.image, alt="", loading="lazy", width="440", height="112")
    play = element("button", type="button", class_="play", aria_label=f"Play {what}")
    track = element("div", picture, element("span", class_="playhead"), seek, class_="track")
    return element("div", play, track, _take_buttons(takes), class_="player", data_audio=first.audio)


def _take_buttons(takes: Sequence[Take]) -> Html | None:
    if len(takes) == 1:
        return None
    buttons = [
        element(
            "button", number, type="button", aria_label=f"Decode {number}", aria_pressed=str(number == 1).lower(),
            data_audio=take.audio, data_image=take.image, data_seconds=f"{take.seconds:.3f}",
        )
        for number, take in enumerate(takes, start=1)
    ]  # fmt: skip
    return element("div", *buttons, class_="takes", role="group", aria_label="Decodes of the same codes")


# ---- small parts


def _system_name(system: System) -> Html:
    detail = element("small", system["detail"]) if system.get("detail") else None
    return join([_explained(system["title"], system.get("note")), detail])


def _explained(title: str, note: str | None) -> Html:
    """A title with its note behind a question mark, which stays on the line of the last word."""
    if not note:
        return element("span", title)
    hint = element("button", "?", type="button", class_="hint", data_note=note, aria_label=f"{title}: {note}")
    before, space, last = title.rpartition(" ")
    return element("span", before, space, element("span", last, hint, class_="together"))


def _empty_cell() -> Html:
    return element("td", _NOTHING, class_="nothing")


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _signed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
