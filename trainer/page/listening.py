"""The listening sections: a grid for each range of rates, several decodes of the same codes, and the player's bar."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.evaluate.systems import RATE_RANGES
from trainer.page.html import NOTHING, Html, element, join, section
from trainer.page.recordings import IMAGE_SIZE, Take, Takes
from trainer.page.system_cells import (
    ROLES,
    EvaluationReport,
    SystemEntry,
    in_table,
    played,
    system_name,
    with_role,
)

ClipEntry = Mapping[str, Any]

_MOST_RATES = 4
_PHONE_WIDTH = 700  # up to this width in pixels a clip is a card; players.css has the same limit
_HOW = (
    "Each row is a clip, each column a system. Press a spectrogram to play the recording from that point. The button "
    "of another system switches to it without interrupting the sound. Numbered buttons are decodes of the same codes."
)
_VARIABILITY = (
    "The same codes are decoded with different seeds. What all decodes have in common comes from the codes; the "
    "decoder invents the differences."
)
_KEYS = (
    ("Space", "play or pause"),
    ("← →", "system"),
    ("↑ ↓", "clip"),
    ("1 … 9", "decode"),
    ("⇧ ← →", "seek"),
    ("L", "loop"),
    ("Esc", "close"),
)


def sections(report: EvaluationReport, takes: Takes) -> list[tuple[str, str, Html]]:
    """Return anchor, title and content of each section.

    There is a grid of clips for each range of rates that has audio, then the section of several decodes.
    """
    with_audio = played(report)
    found = []
    for table in RATE_RANGES.values():
        columns = [system for system in in_table(report, table) if system["key"] in with_audio]
        if any(system["role"] in ("system", "baseline") for system in columns):
            found.append((table.key.replace("_", "-"), table.title, table.lead, columns))
    if not found and with_audio:
        columns = [system for role in ROLES[1:] for system in with_role(report, role) if system["key"] in with_audio]
        found.append(("clips", "Clips", "No codec has recordings yet.", columns))
    parts = []
    for number, (anchor, title, lead, columns) in enumerate(found):
        keys = [] if number else [_keys()]
        text = lead if number else f"{lead} {_HOW}"
        grid = _grid(report, columns, takes)
        parts.append((anchor, title, section(title, text, *keys, grid, id=anchor, class_=f"columns-{len(columns)}")))
    return [*parts, *_variability(report, takes)]


def _variability(report: EvaluationReport, takes: Takes) -> list[tuple[str, str, Html]]:
    """Return the section of several decodes, one row for each of up to four rates; empty without such decodes."""
    rates = _varied(report, takes)
    if not rates:
        return []
    most = max(len(takes.get((clip["key"], s["key"]), ())) for clip in report["clips"] for s in rates)
    heads = [element("th", _original_title(report), scope="col"), element("th", "Rate", scope="col", class_="rate")]
    heads += [element("th", f"Decode {number}", scope="col") for number in range(1, most + 1)]
    bodies = [_varied_clip(report, clip, rates, takes, most) for clip in report["clips"]]
    table = _table(heads, [body for body in bodies if body], class_="clips varied")
    part = section("Variability", _VARIABILITY, table, id="variability", class_=f"columns-{most + 1}")
    return [("variability", "Variability", part)]


def style(report: EvaluationReport, takes: Takes) -> str:
    """Return CSS that sets the width of sections by their number of columns, and when a grid becomes a table.

    In a window that is wide enough, each system has its own column and the head stays visible. Otherwise systems wrap.
    """
    most = max(len(report["systems"]), 1 + max((len(found) for found in takes.values()), default=0))
    return "".join(_style_of(columns) for columns in range(most + 1))


def bar() -> Html:
    """Return the player's bar at the bottom of the window, which the script fills and shows."""
    play = element("button", type="button", class_="play", aria_label="Play")
    title = element("div", element("p", dir="auto"), element("p"), class_="what")
    loop = element("button", "Loop", type="button", class_="loop", aria_pressed="false")
    systems = element("div", class_="systems", role="group", aria_label="Systems")
    inner = element("div", play, title, element("output", class_="time"), systems, loop, class_="inner measure")
    return element("div", inner, class_="bar", role="region", aria_label="Player", hidden="")


def _keys() -> Html:
    """Return the list of keyboard shortcuts."""
    pairs = [element("span", element("kbd", key), f" {what}") for key, what in _KEYS]
    return element("p", *pairs, class_="keys measure")


# ---- a grid


def _grid(report: EvaluationReport, columns: Sequence[SystemEntry], takes: Takes) -> Html:
    """Return a grid: a row for each clip, a column for each system. The original stays visible next to the caption."""
    heads = [element("th", _original_title(report), scope="col")]
    heads += [element("th", system_name(system), scope="col", class_=f"role-{system['role']}") for system in columns]
    bodies = []
    for clip in report["clips"]:
        cells = [element("th", *_first_cell(report, clip, takes), scope="row", class_="clip")]
        cells += [element("td", _recording(system, clip, takes), class_=f"role-{system['role']}") for system in columns]
        bodies.append(_body(clip, [element("tr", *cells)]))
    return _table(heads, bodies, class_="clips")


def _table(heads: Iterable[Html], bodies: Iterable[Html], *, class_: str) -> Html:
    return element("table", element("thead", element("tr", *heads)), *bodies, class_=f"{class_} measure")


def _body(clip: ClipEntry, rows: Iterable[Html]) -> Html:
    return element("tbody", *rows, data_clip=clip["key"], data_caption=_caption(clip))


def _first_cell(report: EvaluationReport, clip: ClipEntry, takes: Takes) -> list[Html]:
    """Return caption and length of the clip, and the original's player."""
    parts = [element("p", _caption(clip), class_="caption", dir="auto")]
    if clip.get("seconds"):
        parts.append(element("p", f"{clip['seconds']:.1f} s", class_="seconds"))
    return parts + [_recording(system, clip, takes) for system in with_role(report, "original")[:1]]


def _recording(system: SystemEntry, clip: ClipEntry, takes: Takes) -> Html:
    found = takes.get((clip["key"], system["key"]), ())
    player = _player(system, clip, found) if found else element("span", NOTHING, class_="nothing")
    return join([element("p", system["title"], class_="name"), player])


def _player(system: SystemEntry, clip: ClipEntry, takes: Sequence[Take], *, number: int = 0) -> Html:
    """Return a player: a spectrogram to seek in, and a button for each take; `number` labels a single take."""
    first, title = takes[0], system["title"] + (f", decode {number}" if number else "")
    what = f"{title}, {_caption(clip)}"
    seek = element(
        "input", type="range", min="0", max=f"{first.seconds:.3f}", step="0.001", value="0",
        autocomplete="off", aria_label=f"Position in {what}",
    )  # fmt: skip
    picture = element("img", src=first.image, alt="", loading="lazy", decoding="async", **IMAGE_SIZE)
    play = element("button", type="button", class_="play", aria_label=f"Play {what}")
    track = element("div", picture, element("span", class_="playhead"), seek, class_="track")
    return element(
        "div", play, track, _take_buttons(takes),
        class_="player", style=f"--seconds: {first.seconds:.3f}",
        data_sound=first.name, data_title=title, data_label=f"Decode {number}" if number else title,
        data_column=number or system["key"],
    )  # fmt: skip


def _take_buttons(takes: Sequence[Take]) -> Html | None:
    if len(takes) == 1:
        return None
    buttons = [
        element(
            "button", number, type="button", aria_label=f"Decode {number}", aria_pressed=str(number == 1).lower(),
            data_sound=take.name, data_seconds=f"{take.seconds:.3f}",
        )
        for number, take in enumerate(takes, start=1)
    ]  # fmt: skip
    return element("div", *buttons, class_="takes", role="group", aria_label="Decodes of the same codes")


# ---- variability


def _varied(report: EvaluationReport, takes: Takes) -> list[SystemEntry]:
    """Return the codecs that were decoded several times, at most four of them, evenly spread over the rates."""
    several = {system for (_, system), found in takes.items() if len(found) > 1}
    systems = [system for system in with_role(report, "system") if system["key"] in several]
    if len(systems) <= _MOST_RATES:
        return systems
    return [systems[round(n * (len(systems) - 1) / (_MOST_RATES - 1))] for n in range(_MOST_RATES)]


def _varied_clip(
    report: EvaluationReport, clip: ClipEntry, rates: Sequence[SystemEntry], takes: Takes, most: int
) -> Html | None:
    shown = [system for system in rates if len(takes.get((clip["key"], system["key"]), ())) > 1]
    if not shown:
        return None
    rows = [_varied_row(system, clip, takes[clip["key"], system["key"]], most) for system in shown]
    first = element("th", *_first_cell(report, clip, takes), scope="rowgroup", rowspan=len(shown), class_="clip")
    return _body(clip, [element("tr", first, rows[0]), *(element("tr", row) for row in rows[1:])])


def _varied_row(system: SystemEntry, clip: ClipEntry, takes: Sequence[Take], most: int) -> Html:
    cells = [element("th", system_name(system), scope="row", class_="rate")]
    for number, take in enumerate(takes, start=1):
        name = element("p", f"Decode {number}", class_="name")
        cells.append(element("td", name, _player(system, clip, [take], number=number)))
    cells += [element("td") for _ in range(most - len(takes))]
    return join(cells)


# ---- small parts


def _caption(clip: ClipEntry) -> str:
    return clip.get("caption") or clip["key"]


def _original_title(report: EvaluationReport) -> str:
    return next((system["title"] for system in with_role(report, "original")), "Clip")


def _style_of(columns: int) -> str:
    name = f".columns-{columns}"
    ample, needed = max(1400, 240 + 170 * columns), max(_PHONE_WIDTH + 1, 304 + 160 * columns)
    rules = (
        f"{name} .clips, {name} .clips :is(thead, tbody, tr, th, td) {{ display: revert; }}",
        f"{name} .clips tbody > :last-child > *, {name} .clips .clip {{ border-bottom: 1px solid var(--faint); }}",
        f"{name} .clips thead th {{ position: sticky; top: 0; z-index: 3; border-bottom: 1px solid var(--muted); }}",
        f"{name} .name {{ display: none; }}",
    )
    return f"{name} {{ --wide: {ample}px; }}\n@media (min-width: {needed}px) {{ {' '.join(rules)} }}\n"
