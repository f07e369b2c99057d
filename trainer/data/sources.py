"""The sound files of a folder: what they are called, what they are captioned, and which of them are held out."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from trainer.data.audio import find_audio

_CAPTIONS = "captions.jsonl"


@dataclass(frozen=True)
class Source:
    """A sound file."""

    path: Path
    name: str
    """The path relative to the folder, with slashes."""
    key: str
    """ASCII letters, digits and -, begins the keys of its clips; no two files of a folder have the same."""
    caption: str

    @property
    def base_name(self) -> str:
        """The file's name without folder and suffix: files that share it are never parted into train and test."""
        return unicodedata.normalize("NFC", self.path.stem)


def list_sources(folder: Path) -> list[Source]:
    """All sound files of a folder, sorted by path.

    A caption is what `captions.jsonl` in the folder says of the file (a line for each: {"file": …, "caption": …}), or a
    `.txt` or `.json` ({"caption": …}) beside the file and named like it, or else it is made of the file's name.

    Raises:
        ValueError: there is no sound, or captions can't be read.
    """
    captions = _read_captions(folder / _CAPTIONS)
    taken: set[str] = set()
    sources = []
    for path in find_audio(folder):
        name = path.relative_to(folder).as_posix()
        caption = captions.get(name) or _sidecar_caption(path) or _caption_from_name(path.stem)
        sources.append(Source(path, name, _free_key(path.stem, taken), caption))
    return sources


def held_out(base_names: Iterable[str], *, fraction: float, seed: int) -> set[str]:
    """Which base names are for testing: each by its own hash, so that more files don't move the ones that were there.

    Of two or more names, at least one is held out and at least one is not, unless the fraction is 0.
    """

    def place(name: str) -> tuple[float, str]:
        digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64, name

    places = sorted(place(name) for name in set(base_names))
    count = sum(at < fraction for at, _ in places)
    if fraction > 0 and len(places) > 1:
        count = min(max(count, 1), len(places) - 1)
    return {name for _, name in places[:count]}


def _free_key(stem: str, taken: set[str]) -> str:
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    wanted = re.sub(r"[^A-Za-z0-9]+", "-", ascii_stem)[:60].strip("-") or "sound"
    key, number = wanted, 1
    while key.lower() in taken:  # some file systems that a tar is unpacked on know no case
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
    """`door_open-02` → "door open"."""
    words = re.sub(r"[\W_]+", " ", stem).strip()
    return re.sub(r"(?<=\D)[\d ]+$", "", words).lower() or "sound"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8") from error


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
