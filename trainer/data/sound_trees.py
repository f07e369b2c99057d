"""Finds the sounds among named files that are in no folder of this machine: members of tars, objects of a bucket.

Captions are found as in a folder: in `captions.jsonl`, or in `NAME.txt` or `NAME.json` beside `NAME.wav`. In tars,
which follow the convention of WebDataset, all names that are equal up to the first dot belong together, so that
`NAME.txt` also describes `NAME.near.wav` and `NAME.far.wav`, and other entries of `NAME.json` are the sound's facts.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data.captions import CaptionFile, captions_of, parse_text
from trainer.data.find_sounds import CAPTIONS, RECORDS, SUFFIXES, Counts, is_caption
from trainer.data.origins import Origin
from trainer.file_names import as_unicode

_LARGEST_TEXT = 4 << 20  # bytes of a file of captions of one sound
_LARGEST_CAPTIONS = 1 << 30  # bytes of captions.jsonl
_THREADS = 8  # threads that read captions


@dataclass(frozen=True)
class Listed:
    """A sound of a source, before it has a key."""

    name: str
    """A relative path with slashes."""
    origin: Origin
    captions: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    home: str = ""
    """What tells it apart from another sound of the same name: its tar, or its row."""
    is_named: bool = True
    """Whether the name says what is heard."""


@dataclass(frozen=True)
class Tree:
    """Named files."""

    where: str
    """Its place, for people."""
    origins: Mapping[str, Origin]
    """Name → where the bytes are, in the order of the sounds."""
    sizes: Mapping[str, int]
    read: Callable[[str], bytes]
    """Returns the bytes of a small file."""
    keys: bool = False
    """Whether names that are equal up to the first dot belong together."""


def sounds_of(tree: Tree, passed_over: Counts, notes: Counts) -> Iterator[Listed]:
    """Yield the sounds of a tree in its order; all else is counted in `passed_over`, and odd captions in `notes`."""
    names = [name for name in tree.origins if not _is_passed_over(name, passed_over)]
    sounds = [name for name in names if name.lower().endswith(SUFFIXES)]
    beside: dict[str, set[str]] = {}
    for name in sounds:
        stems = beside.setdefault(posixpath.dirname(name), set())
        stems |= {posixpath.splitext(posixpath.basename(name))[0], *([_key(name)] if tree.keys else [])}
    for name in names:
        folder, base = posixpath.split(name)
        if not name.lower().endswith(SUFFIXES) and not is_caption(base, beside.get(folder, set())):
            passed_over.add(posixpath.splitext(base)[1].lower() or "without suffix", name)
    captions = CaptionFile(Path(CAPTIONS), _text(tree, CAPTIONS, _LARGEST_CAPTIONS) if CAPTIONS in names else "")
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _sidecar(tree, name) if not captions.of(name) else ([], {}, ""), sounds)
        for name, (beside_it, facts, unread) in zip(sounds, found, strict=True):
            if unread:
                notes.add("files of captions that can't be read", f"{tree.where} {unread}")
            yield Listed(name, tree.origins[name], captions.of(name) or beside_it, facts)
    for unused in captions.unused():
        notes.add("captions that name no sound", unused)


def _is_passed_over(name: str, passed_over: Counts) -> bool:
    parts = name.split("/")
    if any(part.startswith(".") for part in parts):
        passed_over.add("hidden", name)
        return True
    return parts[-1] in RECORDS


def _key(name: str) -> str:
    return posixpath.basename(name).partition(".")[0]


def _sidecar(tree: Tree, name: str) -> tuple[list[str], dict[str, Any], str]:
    """Return the captions and facts of the file of captions beside a sound, and its name if it can't be read."""
    stem = posixpath.splitext(name)[0]
    stems = [stem, *([posixpath.join(posixpath.dirname(name), _key(name))] if tree.keys else [])]
    for path in (f"{one}{suffix}" for one in dict.fromkeys(stems) for suffix in (".txt", ".json")):
        if path in tree.origins:
            try:
                return *_read_sidecar(tree, path), ""
            except ValueError:
                return [], {}, path
    return [], {}, ""


def _read_sidecar(tree: Tree, path: str) -> tuple[list[str], dict[str, Any]]:
    text = _text(tree, path, _LARGEST_TEXT)
    if path.endswith(".txt"):
        return captions_of({"caption": text}), {}
    entry = parse_text(text, path)
    if not isinstance(entry, dict):
        return [], {}
    captions = captions_of(entry) or captions_of({"caption": entry.get("text")}) if tree.keys else captions_of(entry)
    others = {as_unicode(key): value for key, value in entry.items() if key not in ("caption", "text", "__key__")}
    return captions, others if tree.keys else {}


def _text(tree: Tree, name: str, most: int) -> str:
    """Return the text of a file; raises ValueError if it is too long or holds none."""
    if tree.sizes[name] > most:
        raise ValueError(f"{tree.where} {name} has more than {most >> 20} MiB")
    try:
        return tree.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{tree.where} {name} is not text in UTF-8: convert it") from error
