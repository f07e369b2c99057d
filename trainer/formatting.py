"""Formats text, tables and sizes for people to read."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from trainer.file_names import printable

_MARKUP = re.compile(r"[\\`*_{}\[\]#|~$!]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Format rows of cells as lines of aligned columns; control characters in a cell become visible.

    `right` has the indices of right-aligned columns.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def in_markdown(text: str) -> str:
    """Return text on one line that Markdown shows literally: no link, image, HTML, code or cell's end."""
    line = "".join(_ENTITIES.get(letter, letter) for letter in printable(" ".join(text.split())))
    return _MARKUP.sub(r"\\\g<0>", line)


def size(count: float) -> str:
    """Format a number of bytes in B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
