"""Turns names of files into text: such as is valid UTF-8, and such as is safe to print."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters, those of a terminal's escape sequences among them, and those that change a line's direction."""

_BREAKS = re.compile("([\n\t])")


def as_unicode(text: str) -> str:
    """Return text that can be written as UTF-8: bytes of a name that are not UTF-8 become `\\xe9`, and so on."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:  # half of a surrogate pair, which a JSON file may name as an escape
            return text.encode("utf-8", "backslashreplace").decode()
    return text


def printable(text: str) -> str:
    """Return text of one line that is safe to print: control characters become `\\x1b`, `\\x0a` and so on."""
    return _CONTROL.sub(lambda match: _escape(match[0]), as_unicode(text))


def printable_lines(text: str) -> str:
    """Return text of several lines that is safe to print: as `printable` does, but line breaks and tabs stay."""
    return "".join(part if part in ("\n", "\t") else printable(part) for part in _BREAKS.split(text))


def _escape(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
