"""Where one listens: a grid for each range of rates, decodes of the same codes side by side, and the player's bar."""

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
_PHONE_WIDTH = 700  # up to here a clip is a card, as page.css has it too
_HOW = (
    "A row is a clip, a column what became of it. Press a spectrogram to hear it from there; the button of another "
    "system goes on with it from where the sound is. The numbers are decodes of the very same codes."
)
_VARIABILITY = (
    "The same codes, decoded with other seeds: what all have in common is what the codes say, the rest is invented."
)
_KEYS = (
    ("Space", "play, pause"),
    ("← →", "system"),
    ("↑ ↓", "clip"),
    ("1 … 9", "decode"),
    ("⇧ ← →", "back, forth"),
    ("L", "loop"),
    ("Esc", "end"),
)


def sections(report: EvaluationReport, takes: Takes) -> list[tuple[str, str, Html]]:
    """Anchor, title and content: a grid of clips for each range of rates of which there is sound, then the decodes."""
    heard = played(report)
    found = []
    for table in RATE_RANGES.values():
        columns = [system for system in in_table(report, table) if system["key"] in heard]
        if any(system["role"] in ("system", "baseline") for system in columns):
            found.append((table.key.replace("_", "-"), table.title, table.lead, columns))
    if not found and heard:
        columns = [system for role in ROLES[1:] for system in with_role(report, role) if system["key"] in heard]
        found.append(("clips", "Clips", "No codec has been heard yet.", columns))
    parts = []
    for number, (anchor, title, lead, columns) in enumerate(found):
        how = [] if number else [_keys()]
        text = lead if number else f"{lead} {_HOW}"
        grid = _grid(report, columns, takes)
        parts.append((anchor, title, section(title, text, *how, grid, id=anchor, class_=f"columns-{len(columns)}")))
    return [*parts, *_variability(report, takes)]


def _variability(report: EvaluationReport, takes: Takes) -> list[tuple[str, str, Html]]:
    """Decodes of the same codes, a row a rate, at up to four rates; nothing where nothing was decoded twice."""
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
    """The width of a section by its number of columns, and from which width of the window on its grid is a table.

    There every system has its column and the head of the grid stays in sight. In narrower windows systems wrap.
    """
    most = max(len(report["systems"]), 1 + max((len(found) for found in takes.values()), default=0))
    return "".join(_style_of(columns) for columns in range(most + 1))


def bar() -> Html:
    """What plays, at the foot of the window: filled and shown by the script."""
    play = element("button", type="button", class_="play", aria_label="Play")
    title = element("div", element("p", dir="auto"), element("p"), class_="what")
    loop = element("button", "Loop", type="button", class_="loop", aria_pressed="false")
    systems = element("div", class_="systems", role="group", aria_label="Systems")
    inner = element("div", play, title, element("output", class_="time"), systems, loop, class_="inner measure")
    return element("div", inner, class_="bar", role="region", aria_label="Player", hidden="")


def _keys() -> Html:
    """The keys that the page listens to."""
    pairs = [element("span", element("kbd", key), f" {what}") for key, what in _KEYS]
    return element("p", *pairs, class_="keys measure")


# ---- a grid


def _grid(report: EvaluationReport, columns: Sequence[SystemEntry], takes: Takes) -> Html:
    """A row a clip, a column a system. The original, which all is compared to, stays in sight beside the caption."""
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
    """What the clip is, and the original."""
    parts = [element("p", _caption(clip), class_="caption", dir="auto")]
    if clip.get("seconds"):
        parts.append(element("p", f"{clip['seconds']:.1f} s", class_="seconds"))
    return parts + [_recording(system, clip, takes) for system in with_role(report, "original")[:1]]


def _recording(system: SystemEntry, clip: ClipEntry, takes: Takes) -> Html:
    found = takes.get((clip["key"], system["key"]), ())
    heard = _player(system, clip, found) if found else element("span", NOTHING, class_="nothing")
    return join([element("p", system["title"], class_="name"), heard])


def _player(system: SystemEntry, clip: ClipEntry, takes: Sequence[Take], *, number: int = 0) -> Html:
    """A spectrogram to play and to seek in, with a button a take; or take `number` of several alone."""
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
    """The codecs that were decoded more than once; of more than four, those that span the rates evenly."""
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
