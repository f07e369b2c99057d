"""HTML as text: pure functions from data to what a browser shows.

All of the page is built by `element`, which escapes whatever is not `Html` already: no caption, title or note can get
out of its place, and no caller has to remember it.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from typing import TypeGuard

_VOID = {"img", "input", "meta"}
NOTHING = "—"
"""Stands where something is missing."""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


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


def document(title: str, body: Iterable[object], *, style: str, script: str, **attributes: object) -> str:
    """A whole page that needs no other file but what its elements name; the attributes are its body's."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style)),
    )
    page = element("html", head, element("body", *body, element("script", Html(script)), **attributes), lang="en")
    return f"<!doctype html>\n{page}\n"


def section(title: str, lead: str, *children: object, **attributes: object) -> Html:
    """A part of the page under its heading."""
    heading = element("div", element("h2", title), element("p", lead, class_="lead"), class_="measure")
    return element("section", heading, *children, **attributes)


def explained(title: str, note: str | None) -> Html:
    """A title with its note behind a question mark, which stays on the line of the last word or its last part."""
    if not note:
        return element("span", title)
    hint = element("button", "?", type="button", class_="hint", data_note=note, aria_label=f"{title}: {note}")
    *before, last = re.split(r"(?<=[ -])", title)
    return element("span", *before, element("span", last, hint, class_="together"))


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def signed(value: float, digits: int) -> str:
    """A number with so many digits after the point and a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def count(number: int, noun: str) -> str:
    """`1 clip`, `2 clips`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
