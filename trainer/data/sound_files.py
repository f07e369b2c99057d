"""The sound files of a folder or a manifest: their names, their captions, and which of them are held out."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from trainer.data.audio import find_audio

_CAPTIONS = "captions.jsonl"
MANIFESTS = (".jsonl", ".csv")


@dataclass(frozen=True)
class SoundFile:
    """A sound file."""

    path: Path
    name: str
    """The path relative to the folder, with slashes."""
    key: str
    """The prefix of its clips' keys, of ASCII letters, digits and -; unique among the files of a folder."""
    caption: str
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The other entries of the file in a manifest."""

    @property
    def base_name(self) -> str:
        """The file's name without folder and suffix; files with the same base name go to the same set."""
        return unicodedata.normalize("NFC", self.path.stem)


def list_sources(audio: Path) -> list[SoundFile]:
    """List all sound files of a folder, sorted by path, or those of a manifest, sorted by name.

    A manifest is a `.jsonl` (one object per line) or a `.csv` (with a header). Each entry has a `file`, absolute or
    relative to the manifest, optionally a `caption`, and any other values that are to be stored with the file.

    The caption of a file is the first of these that exists: the manifest's, or in a folder the one in `captions.jsonl`
    (lines of {"file": …, "caption": …}); the one in a `.txt` or `.json` ({"caption": …}) of the same name next to the
    file; the words of the file's name.

    Raises:
        ValueError: there are no sound files, or the captions or the manifest can't be read.
    """
    if audio.suffix.lower() in MANIFESTS:
        entries = _read_manifest(audio)
    else:
        captions = _read_captions(audio / _CAPTIONS)
        names = (path.relative_to(audio).as_posix() for path in find_audio(audio))
        entries = {name: {"caption": captions.get(name, "")} for name in names}
    taken: set[str] = set()
    sources = []
    for name, entry in entries.items():
        path = (audio.parent if audio.suffix.lower() in MANIFESTS else audio) / name
        caption = _caption(entry) or _sidecar_caption(path) or _caption_from_name(path.stem)
        facts = {key: value for key, value in entry.items() if key not in ("file", "caption")}
        sources.append(SoundFile(path, name, _free_key(path.stem, taken), caption, facts))
    return sources


def held_out(base_names: Iterable[str], *, fraction: float, seed: int) -> set[str]:
    """Return the base names of the test set.

    Each name is chosen by its own hash, so that adding files does not move the others between the sets. Of two or more
    names, at least one is held out and at least one is not, unless the fraction is 0.
    """

    def hashed(name: str) -> tuple[float, str]:
        digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64, name

    ranking = sorted(hashed(name) for name in set(base_names))
    count = sum(number < fraction for number, _ in ranking)
    if fraction > 0 and len(ranking) > 1:
        count = min(max(count, 1), len(ranking) - 1)
    return {name for _, name in ranking[:count]}


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return file → its entry in the manifest, sorted by file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    text = _read_text(path)
    if path.suffix.lower() == ".csv":
        try:
            rows: list[object] = list(csv.DictReader(io.StringIO(text, newline=""), restkey="more columns"))
        except csv.Error as error:
            raise ValueError(f"{path} is not CSV: {error}") from error
        numbered = list(enumerate(rows, 2))
    else:
        lines = ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())
        numbered = [(number, _parse(line, f"{path}, line {number}")) for number, line in lines]
    entries: dict[str, dict[str, Any]] = {}
    for number, entry in numbered:
        name = entry.get("file") if isinstance(entry, dict) else None
        if not (isinstance(entry, dict) and isinstance(name, str) and name):
            raise ValueError(f"{path}, line {number} names no file: each needs a `file`, and may have a `caption`")
        if name in entries:
            raise ValueError(f"{path}, line {number} names {name} again: name each file once")
        entries[name] = entry
    if not entries:
        raise ValueError(f"{path} names no file: add an entry with a `file` for each sound")
    return dict(sorted(entries.items()))


def _free_key(stem: str, taken: set[str]) -> str:
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    wanted = re.sub(r"[^A-Za-z0-9]+", "-", ascii_stem)[:60].strip("-") or "sound"
    key, number = wanted, 1
    while key.lower() in taken:  # a tar may be unpacked on a case-insensitive file system
        number += 1
        key = f"{wanted}-{number}"
    taken.add(key.lower())
    return key


def _read_captions(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if line.strip():
            entry = _parse(line, f"{path}, line {number}")
            if not (isinstance(entry, dict) and isinstance(entry.get("file"), str) and _caption(entry)):
                raise ValueError(f'{path}, line {number} is not like {{"file": "a/b.wav", "caption": "…"}}')
            captions[entry["file"]] = _caption(entry)
    return captions


def _sidecar_caption(path: Path) -> str:
    if (text := path.with_suffix(".txt")).is_file():
        return " ".join(_read_text(text).split())
    if (description := path.with_suffix(".json")).is_file():
        return _caption(_parse(_read_text(description), str(description)))
    return ""


def _caption(entry: object) -> str:
    caption = entry.get("caption") if isinstance(entry, dict) else None
    return " ".join(caption.split()) if isinstance(caption, str) else ""


def _caption_from_name(stem: str) -> str:
    """Turn a file name into words: `door_open-02` → "door open"."""
    words = re.sub(r"[\W_]+", " ", stem).strip()
    return re.sub(r"(?<=\D)[\d ]+$", "", words).lower() or "sound"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: convert the file") from error


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
