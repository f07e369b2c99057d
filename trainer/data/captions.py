"""Reads captions: of a manifest, of `captions.jsonl`, of files next to a sound, and of the words in a file's name."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.disk_errors import NO_FILE, patiently, with_number
from models.readable import describe_os_error, is_broken_link
from models.regular_file import open_regular
from trainer.data.find_sounds import Counts
from trainer.file_names import as_unicode, printable

_JOINERS = "\u200c\u200d"  # zero-width characters inside words of Persian, Hindi and others
_DELIMITERS = (",", ";", "\t")


def read_manifest(path: Path, text: str | None = None) -> dict[str, dict[str, Any]]:
    """Return file → its entry in the manifest, sorted by file.

    Args:
        path: the manifest.
        text: its text, if it is no file of this machine.

    Raises:
        ValueError: the manifest can't be read, or an entry names no file or one that an earlier entry names.
    """
    if text is None:
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        text = _read_text(path)
    numbered = _csv_rows(path, text) if path.suffix.lower() == ".csv" else list(_json_lines(path, text))
    entries: dict[str, dict[str, Any]] = {}
    for number, entry in numbered:
        name = entry.get("file") if isinstance(entry, dict) else None
        if not (isinstance(entry, dict) and isinstance(name, str) and name) or "\0" in name:
            raise ValueError(f"{path}, line {number} names no file: each needs a `file`, and may have a `caption`")
        if name in entries:
            raise ValueError(f"{path}, line {number} names {printable(name)} again: name each file once")
        entries[name] = entry
    if not entries:
        raise ValueError(f"{path} names no file: add an entry with a `file` for each sound")
    return dict(sorted(entries.items()))


def _csv_rows(path: Path, text: str) -> list[tuple[int, object]]:
    """Return line number → row of a CSV file, whose columns are separated by commas, semicolons or tabs."""
    header = text.partition("\n")[0]
    columns = {mark: [name.strip() for name in next(csv.reader([header], delimiter=mark), [])] for mark in _DELIMITERS}
    mark = next((mark for mark, names in columns.items() if "file" in names), ",")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey="more columns", delimiter=mark)
        reader.fieldnames = columns[mark]
        next(reader.reader, None)
        rows: list[tuple[int, object]] = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}") from error
    if _quote_is_open(text, mark):
        raise ValueError(f"{path} is not CSV: a quotation mark is never closed, so that several lines read as one")
    return rows


def _quote_is_open(text: str, mark: str) -> bool:
    try:
        for _ in csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True):
            pass
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, object]]:
    """Yield the number and the value of each line. Only a newline ends a line: JSON may hold U+2028 and others."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, parse_text(line, f"{path}, line {number}")


class CaptionFile:
    """The captions of a folder's `captions.jsonl`, lines of {"file": …, "caption": …}; none if the file is missing.

    A name matches a file in any Unicode normal form, with `/` or `\\`, with `./` before it, or as an absolute path.

    Args:
        path: the file.
        text: its text, if it is no file of this machine.

    Raises:
        ValueError: the file can't be read, or a line has another form.
        OSError: its disk failed.
    """

    def __init__(self, path: Path, text: str | None = None) -> None:
        self._folder = path.parent
        self._captions: dict[str, list[str]] = {}
        self._last: dict[str, str] = {}
        self._forms: dict[str, str] = {}
        """Plain form of a name → the name in the file."""
        self._used: set[str] = set()
        if text is None:
            text = _read_text(path) if is_there(path) else ""
        for number, entry in _json_lines(path, text):
            found = captions_of(entry)
            if not (isinstance(entry, dict) and isinstance(entry.get("file"), str) and found):
                raise ValueError(f'{path}, line {number} is not like {{"file": "a/b.wav", "caption": "…"}}')
            known = self._captions.setdefault(entry["file"], [])
            known += [caption for caption in found if caption not in known]
            self._last[entry["file"]] = found[-1]
            self._forms.setdefault(self._plain(entry["file"]), entry["file"])

    def of(self, name: str) -> list[str]:
        """Return the captions of a file, given its name relative to the folder."""
        key = name if name in self._captions else self._forms.get(self._plain(name), "")
        self._used.add(key)
        return self._captions.get(key, [])

    def last_of(self, name: str) -> str:
        """Return the last caption of a file that is spelled exactly so, or an empty text."""
        return self._last.get(name, "")

    def unused(self) -> list[str]:
        """Return a line for each name that matched no file so far: the name and its first caption."""
        return [f"{name} ({found[0]})" for name, found in self._captions.items() if name not in self._used]

    def _plain(self, name: str) -> str:
        if name.startswith("/"):
            name = os.path.relpath(name, self._folder.absolute())
        return posixpath.normpath(unicodedata.normalize("NFC", as_unicode(name)).replace("\\", "/"))


def captions_of(entry: object) -> list[str]:
    """Return the captions of an entry, {"caption": text or a list of texts}, without those that are empty."""
    found = entry.get("caption") if isinstance(entry, dict) else None
    texts = found if isinstance(found, list) else [found]
    captions = [as_unicode(" ".join(text.split())) for text in texts if isinstance(text, str)]
    return [caption for caption in dict.fromkeys(captions) if caption]


def sidecar_captions(path: Path, notes: Counts) -> list[str]:
    """Return the captions of `NAME.txt` or `NAME.json` next to a sound; `notes` counts those that can't be used.

    Raises:
        ValueError: one of them is a link to something that is missing, perhaps only now.
        OSError: its disk failed. The caption may be whole, so the words of the file's name must not replace it.
    """
    for suffix in (".txt", ".json"):
        sidecar = path.with_suffix(suffix)
        if not is_there(sidecar) or sidecar.is_dir():
            continue
        if is_broken_link(sidecar):
            raise ValueError(
                f"{sidecar} is a link to {sidecar.readlink()}, which is missing: fetch it or remove the link"
            )
        try:
            text = _read_text(sidecar)
            return captions_of({"caption": text} if suffix == ".txt" else parse_text(text, str(sidecar)))
        except ValueError:
            notes.add("files of captions that can't be read", str(sidecar))
            return []
    return []


def is_there(path: Path) -> bool:
    """Whether there is anything of this name, be it a link to nothing; raises OSError if the disk can't say."""
    try:
        patiently(path.lstat)
    except OSError as error:
        if error.errno in NO_FILE:
            return False
        raise
    return True


def caption_from_name(stem: str) -> str:
    """Turn a file name into words: `door_open-02` → "door open". Marks stay with the letters that they belong to."""
    words = ""
    for character in unicodedata.normalize("NFC", stem):
        inside = words[-1:].strip() and (character in _JOINERS or unicodedata.category(character)[0] == "M")
        words += character if character.isalnum() or inside else " "
    words = " ".join(words.strip(_JOINERS + " ").split())
    return re.sub(r"(?<=\D)[\d ]+$", "", words).lower() or "sound"


def _read_text(path: Path) -> str:
    """Return the text of a file; raises ValueError if it holds none or is no file, OSError if its disk failed."""

    def read() -> str:
        with os.fdopen(open_regular(path), encoding="utf-8-sig") as file:
            return file.read()

    try:
        return patiently(read)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8: convert the file, such as with iconv -f LATIN1 -t UTF-8"
        ) from error
    except OSError as error:
        raise with_number(error.errno, describe_os_error(OSError(error.errno, error.strerror, str(path)))) from error


def parse_text(text: str, where: str) -> object:
    """Return the value of a JSON text; raises ValueError that names `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
