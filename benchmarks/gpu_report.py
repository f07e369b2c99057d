"""The rows of `gpu.py`: each is printed, appended to a JSON lines file and put into a table at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

NOTES = ("error", "not available", "not run")
"""What a row says in place of figures."""
_WIDEST_NOTE = 300


class Report:
    """Adds rows to a file, and rewrites the tables beside it, which have the suffix .md.

    Processes may share a report as long as one of them adds rows at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shown = os.fdopen(os.dup(1), "w")  # processes of sections send their own output to a file

    def add(self, section: str, case: str, **figures: Any) -> None:
        """Add a row; a figure is a number, a text, or a text of many lines, which stands below the section's table."""
        row = {"section": section, "case": case, **{name: _rounded(value) for name, value in figures.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.path.with_suffix(".md").write_text("\n".join(markdown(self.rows())) + "\n")
        print(f"{section}: {case}: {_in_words(row)}", file=self._shown, flush=True)

    def note(self, section: str, case: str, note: str, message: object) -> None:
        """Add a row that says why it has no figures; `note` is one of `NOTES`."""
        self.add(section, case, **{note: one_line(message)})

    def rows(self, section: str | None = None) -> list[dict[str, Any]]:
        """Read the rows of a section, or all of them."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if section in (None, row["section"])]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path alone, for a process that is spawned."""
        return Report, (self.path,)


def one_line(message: object) -> str:
    """Return a message's first line with its kind, if it is an exception."""
    text = next((line.strip() for line in str(message).splitlines() if line.strip()), "")
    kind = f"{type(message).__name__}: " if isinstance(message, BaseException) else ""
    return f"{kind}{text}"[:_WIDEST_NOTE]


def markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a document with a table for each section, whose columns are the figures of its rows."""
    for section, of_section in groupby(rows, key=lambda row: row["section"]):
        found = list(of_section)
        texts = [(row["case"], name, value) for row in found for name, value in row.items() if _is_long(value)]
        names = dict.fromkeys(name for row in found for name, value in row.items() if not _is_long(value))
        columns = [name for name in names if name not in ("section", "case", *NOTES)]
        noted = any(note in row for row in found for note in NOTES)
        yield from (f"## {section}", "", f"| | {' | '.join([*columns, *(['note'] if noted else [])])} |")
        yield "|---" * (1 + len(columns) + noted) + "|"
        for row in found:
            note = "; ".join(f"{name}: {row[name]}" for name in NOTES if name in row)
            cells = [row["case"], *(str(row.get(name, "")) for name in columns), *([note] if noted else [])]
            yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
        for case, name, text in texts:
            yield from ("", f"{case}, {name}:", "", *(f"    {line}".rstrip() for line in text.splitlines()))
        yield ""


def _is_long(value: object) -> bool:
    return isinstance(value, str) and "\n" in value


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _in_words(row: dict[str, Any]) -> str:
    figures = {name: value for name, value in row.items() if name not in ("section", "case")}
    return ", ".join(f"{name}\n{value}" if _is_long(value) else f"{name} {value}" for name, value in figures.items())
