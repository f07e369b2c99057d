"""Lists the sounds of one place that `data.audio` names."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.data.bucket import SourceFile, split_url
from trainer.data.captions import caption_from_name, captions_of, read_manifest
from trainer.data.find_sounds import Counts
from trainer.data.locate import Asked, Located
from trainer.data.origins import Lost, Origin, Section, read_bytes, stored_at
from trainer.data.remote import MissingFileError, is_url
from trainer.data.sound_trees import Listed, Tree, sounds_of
from trainer.data.sources import SoundFile, Sources, find_sources
from trainer.data.tables import table_sounds
from trainer.data.tar_members import shown, tar_members
from trainer.file_names import as_unicode, printable
from trainer.urls import has_credentials, without_credentials

_WINDOW = 64 << 10  # bytes that are fetched at once of a tar whose headers alone are wanted
_THREADS = 16  # that ask for the objects of a manifest
_OF_THIS_MACHINE = ("file", "local", "git", "zip", "tar", "libarchive")
"""Protocols that read this machine's disks."""
_OUTSIDE = re.compile(r"^(\.\./)+")

Sound = tuple[str, SoundFile]
"""What tells a sound apart from another one of the same name, and the sound, which has no key yet."""


def list_place(one: Located, asked: Asked, passed_over: Counts, notes: Counts) -> Iterator[Sound]:
    """Yield the sounds of a place in its order.

    Args:
        one: the place.
        asked: what the recipe says.
        passed_over: counts what is no sound.
        notes: counts captions that are not used as they stand.

    Raises:
        ValueError: a manifest, tar or table can't be read.
        SourceError: a server can't be asked.
    """
    if one.kind in ("folder", "manifest"):
        found = find_sources(Path(one.place), own=asked.own)
        _merge(found, passed_over, notes)
        home = posixpath.basename(one.place.rstrip("/"))
        yield from ((home, replace(source, key="")) for source in found.files)
        return
    passed_over.add_all(one.passed_over)
    for sound in _LISTED[one.kind](one, asked, passed_over, notes):
        yield sound.home or posixpath.basename(one.place.rstrip("/")), _sound_file(sound, notes)


def _merge(found: Sources, passed_over: Counts, notes: Counts) -> None:
    passed_over.add_all(found.passed_over)
    notes.add_all(found.captions)


def _sound_file(sound: Listed, notes: Counts) -> SoundFile:
    name, facts = as_unicode(sound.name), dict(sound.facts)
    if len(sound.captions) > 1:
        notes.add("sounds with several captions, whose first is used", name)
        facts.setdefault("captions", sound.captions)
    stem = posixpath.splitext(posixpath.basename(name))[0] if sound.is_named else ""
    caption = sound.captions[0] if sound.captions else caption_from_name(stem)
    return SoundFile(Path(name), name, "", caption, facts, sound.origin)


def _bucket(one: Located, asked: Asked, passed_over: Counts, notes: Counts) -> Iterator[Listed]:
    origins = {name: Section(stored.told, stored, 0, stored.size) for name, stored in one.files.items()}
    yield from sounds_of(_tree(one.told, dict(origins), asked.patience), passed_over, notes)


def _tree(where: str, origins: dict[str, Origin], patience: float, *, keys: bool = False) -> Tree:
    def read(name: str) -> bytes:
        origin = origins[name]
        if not isinstance(origin, Section):
            raise ValueError(f"{where} does not hold {shown(name)}")
        return read_bytes(origin.stored, origin.start, origin.start + origin.size, patience)

    sizes = {name: origin.size if isinstance(origin, Section) else 0 for name, origin in origins.items()}
    return Tree(where, origins, sizes, read, keys)


def _tars(one: Located, asked: Asked, passed_over: Counts, notes: Counts) -> Iterator[Listed]:
    for name, stored in one.files.items():
        origins = _members(stored, asked.patience)
        for sound in sounds_of(_tree(stored.told, origins, asked.patience, keys=True), passed_over, notes):
            yield replace(sound, home=name.removesuffix(".tar"))


def _members(stored: SourceFile, patience: float) -> dict[str, Origin]:
    origins: dict[str, Origin] = {}
    for member in tar_members(stored.told, stored.size, _windowed(stored, patience)):
        name = _OUTSIDE.sub("", member.name)  # nothing is unpacked, but the name is used beside other folders too
        where = f"{stored.told} member {shown(name)}"
        if name in origins:
            raise ValueError(f"{stored.told} holds two members {shown(name)}: unpack the tar and pack the files again")
        origins[name] = Lost(where, member.lack) if member.lack else Section(where, stored, member.offset, member.size)
    return origins


def _windowed(stored: SourceFile, patience: float) -> Callable[[int, int], bytes]:
    """Return a function that reads bytes of a tar; of one on a server it fetches a window and answers from it."""
    first, content = 0, b""

    def read(start: int, end: int) -> bytes:
        nonlocal first, content
        end = min(end, stored.size)
        if start >= end:
            return b""
        if not first <= start <= end <= first + len(content):
            window = _WINDOW if is_url(stored.place) else 0
            first, content = start, read_bytes(stored, start, max(end, min(start + window, stored.size)), patience)
        return content[start - first : end - first]

    return read


def _tables(one: Located, asked: Asked, passed_over: Counts, notes: Counts) -> Iterator[Listed]:
    columns = {"audio": asked.audio_column, "caption": asked.caption_column}
    for name, stored in one.files.items():
        yield from table_sounds(stored, name, patience=asked.patience, **columns)


def _listed(one: Located, asked: Asked, passed_over: Counts, notes: Counts) -> Iterator[Listed]:
    (stored,) = one.files.values()
    text = read_bytes(stored, 0, stored.size, asked.patience)
    try:
        entries = read_manifest(Path(split_url(one.place)[1]), text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{one.told} is not text in UTF-8: convert it") from error
    folder = split_url(one.place)[0]
    if secret := next((name for name in entries if "://" in name and has_credentials(_without_arguments(name))), None):
        raise ValueError(
            f"{one.told} names {without_credentials(printable(secret))}, whose credentials reports and sets would "
            f"show: leave them out, and give them in the store's own environment"
        )
    with ThreadPoolExecutor(_THREADS) as pool:
        origins = pool.map(lambda name: _object(folder, name, asked.patience), entries)
        for (name, entry), origin in zip(entries.items(), origins, strict=True):
            facts: dict[str, Any] = {key: value for key, value in entry.items() if key not in ("file", "caption")}
            plain = posixpath.basename(name) if "://" in name else _OUTSIDE.sub("", posixpath.normpath(name))
            yield Listed(plain, origin, captions_of(entry), facts, posixpath.dirname(name).replace("://", "/"))


def _object(folder: str, name: str, patience: float) -> Origin:
    """Return the object that a manifest in a folder at a URL names."""
    path = name if "://" in name else posixpath.normpath(name)
    if path.startswith(("/", "../")) or not is_url(f"{folder}/{path}"):
        return Lost(f"{folder}/{printable(name)}", "lies outside of the manifest's folder: give it by its URL")
    if _leads_here(path) and not _leads_here(folder):
        return Lost(printable(path), "names a file of this machine, which a manifest at a URL may not")
    place = path if "://" in path else f"{folder}/{path}"
    try:
        stored = stored_at(place, patience)
    except MissingFileError:
        return Lost(printable(place), "is missing")
    return Section(stored.told, stored, 0, stored.size)


def _leads_here(url: str) -> bool:
    """Whether a URL names something on this machine, or may: a chain of protocols can end anywhere."""
    return "::" in url.partition("://")[0] or url.partition("://")[0].lower() in _OF_THIS_MACHINE


def _without_arguments(url: str) -> str:
    """Return a URL without what follows its ?, which in the names of objects is a letter like others."""
    return url if url.lower().startswith("http") else url.partition("?")[0]


_LISTED = {"bucket": _bucket, "tars": _tars, "tables": _tables, "listed": _listed}
