"""Pure functions that build HTML as text.

Every part of the page is built by `element`, which escapes everything that is not already `Html`. A caption, title or
note therefore can't inject markup, and callers need no escaping of their own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from collections.abc import Iterable
from typing import TypeGuard

_VOID = {"img", "input", "meta"}
NOTHING = "—"
"""Placeholder for a missing value."""


class Html(str):
    """Text that is already HTML."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Html:
    """Return `<tag …>children</tag>`, with everything escaped that is not `Html`.

    A trailing underscore of an attribute's name is dropped, other underscores become hyphens (`class_`, `aria_label`).
    Attributes that are None are left out.
    """
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    opening = "".join(f' {name}="{html.escape(str(value))}"' for name, value in given.items())
    if tag in _VOID:
        return Html(f"<{tag}{opening}>")
    return Html(f"<{tag}{opening}>{join(children)}</{tag}>")


def join(children: Iterable[object]) -> Html:
    """Concatenate children, escaping text; None is skipped."""
    texts = (child if isinstance(child, Html) else html.escape(str(child)) for child in children if child is not None)
    return Html("".join(texts))


def document(title: str, body: Iterable[object], *, style: str, script: str, **attributes: object) -> str:
    """Return a complete page with inlined style and script; the attributes are those of its body.

    Neither style nor script may hold text of users: they are not escaped.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style)),
    )
    page = element("html", head, element("body", *body, element("script", Html(script)), **attributes), lang="en")
    return f"<!doctype html>\n{page}\n"


def _policy(style: str, script: str) -> str:
    """Return the content security policy of a page, which a browser enforces should any text ever escape `element`.

    It allows this style and this script, what the script itself loads (the recordings), the pictures beside the page,
    and lengths and levels in style attributes. Nothing comes from a network, and nothing is sent. A page that was
    opened from disk needs `file:`, because not every browser counts files as 'self'.
    """
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_fingerprint(script)}' 'strict-dynamic'",
            f"style-src '{_fingerprint(style)}'",
            "style-src-attr 'unsafe-inline'",
            "img-src 'self' file:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _fingerprint(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def section(title: str, lead: str, *children: object, **attributes: object) -> Html:
    """Return a section of the page with a heading and an introductory sentence."""
    heading = element("div", element("h2", title), element("p", lead, class_="lead"), class_="measure")
    return element("section", heading, *children, **attributes)


def explained(title: str, note: str | None) -> Html:
    """Return a title with a question mark that shows its note; both are kept on one line with the last word."""
    if not note:
        return element("span", title)
    hint = element("button", "?", type="button", class_="hint", data_note=note, aria_label=f"{title}: {note}")
    *before, last = re.split(r"(?<=[ -])", title)
    return element("span", *before, element("span", last, hint, class_="together"))


def is_number(value: object) -> TypeGuard[float]:
    """Whether the value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def signed(value: float, digits: int) -> str:
    """Format a number with `digits` digits after the point and a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def count(number: int, noun: str) -> str:
    """Format a count with its noun: `1 clip`, `2 clips`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
