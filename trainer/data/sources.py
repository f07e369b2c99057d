"""The sound files of a folder or a manifest: their names, keys and captions."""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.data.captions import (
    CaptionFile,
    caption_from_name,
    captions_of,
    is_there,
    read_manifest,
    sidecar_captions,
)
from trainer.data.find_sounds import CAPTIONS, Counts, find_sounds
from trainer.data.origins import Origin
from trainer.file_names import as_unicode, printable

MANIFESTS = (".jsonl", ".csv")


@dataclass(frozen=True)
class SoundFile:
    """A sound file."""

    path: Path
    name: str
    """The path relative to the folder, with slashes. Bytes that are not UTF-8 are escaped, as `\\xe9`."""
    key: str
    """The prefix of its clips' keys, of ASCII letters, digits and -; unique among the files of a folder."""
    caption: str
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The other entries of the file in a manifest; `captions` are all of a file that has several."""
    origin: Origin | None = field(default=None, compare=False)
    """Where its bytes are, if they are no file of this machine; `path` is the name then."""

    @property
    def where(self) -> str:
        """The file's place, for people: its name, or what of a tar, table or bucket it is."""
        return self.name if self.origin is None else self.origin.where

    @property
    def place(self) -> tuple[str, str]:
        """The file's folder and its name without suffix, by which `groups` tells which files belong together."""
        folder = posixpath.dirname(posixpath.normpath(unicodedata.normalize("NFC", self.name)))
        stem = self.path.stem if self.origin is None else PurePosixPath(self.name).stem
        return folder, unicodedata.normalize("NFC", as_unicode(stem))


@dataclass(frozen=True)
class Sources:
    """The sound files of a folder or a manifest, and what was noticed besides."""

    files: list[SoundFile]
    passed_over: Counts
    """What lies in the folder and is no sound file."""
    captions: Counts
    """Captions and files of captions that were not used as they stand."""


def list_sources(audio: Path) -> list[SoundFile]:
    """Return the files of `find_sources`."""
    return find_sources(audio).files


def find_sources(audio: Path, *, own: Iterable[Path] = ()) -> Sources:
    """List all sound files of a folder, sorted by path, or those of a manifest, sorted by name.

    A manifest is a `.jsonl` (one object per line) or a `.csv` (with a header). Each entry has a `file`, absolute or
    relative to the manifest, optionally a `caption`, and any other values that are to be stored with the file.

    The caption of a file is the first of these that exists: the manifest's, or in a folder the one in `captions.jsonl`
    (lines of {"file": …, "caption": …}); the one in a `.txt` or `.json` ({"caption": …}) of the same name next to the
    file; the words of the file's name. Where a file has several captions, the first one is its caption, and all are
    kept in `facts`.

    Args:
        audio: the folder or the manifest.
        own: directories of the run that asks, which are not searched.

    Raises:
        ValueError: there are no sound files, or the captions or the manifest can't be read.
    """
    passed_over, notes, keys = Counts(), Counts(), Keys()
    if audio.suffix.lower() in MANIFESTS:
        listed = [(path, name, captions_of(entry), entry) for name, path, entry in _located(audio)]
    else:
        found, captions = find_sounds(audio, own=own), CaptionFile(audio / CAPTIONS)
        passed_over = found.passed_over
        names = ((path, path.relative_to(audio).as_posix()) for path in found.files)
        listed = [(path, name, captions.of(name), {}) for path, name in names]
        for unused in captions.unused():
            notes.add("captions that name no sound", unused)
    files = []
    for path, name, given, entry in listed:
        all_captions = given or sidecar_captions(path, notes)
        facts = {key: value for key, value in entry.items() if key not in ("file", "caption")}
        if len(all_captions) > 1:
            notes.add("sounds with several captions, whose first is used", name)
            facts.setdefault("captions", all_captions)
        caption = all_captions[0] if all_captions else caption_from_name(path.stem)
        files.append(SoundFile(path, as_unicode(name), keys.free(path.stem), caption, facts))
    return Sources(files, passed_over, notes)


def _located(manifest: Path) -> Iterable[tuple[str, Path, dict[str, Any]]]:
    """Yield the name, path and entry of each file of a manifest; raises ValueError if one is named twice."""
    known: dict[str, str] = {}
    for name, entry in read_manifest(manifest).items():
        there = _spelling_that_exists(manifest.parent, name)
        path = manifest.parent / there
        if (other := known.setdefault(os.path.normpath(path), name)) != name:
            raise ValueError(
                f"{manifest} names {printable(other)} and {printable(name)}, which are one file: name each file once"
            )
        yield there, path, entry


def _spelling_that_exists(folder: Path, name: str) -> str:
    """Return a name as its file is spelled: with `/` for `\\`, in another Unicode normal form, or `~` as the home."""
    if name.isascii() and "\\" not in name and name[0] != "~":
        return name
    slashes = name.replace("\\", "/")
    forms = (unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))
    for spelled in (name, slashes, *forms, os.path.expanduser(name)):  # noqa: PTH111 (a home that is unknown stays a name)
        if is_there(folder / spelled):
            return spelled
    return name


class Keys:
    """Gives each file a key of its own."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._last: dict[str, int] = {}
        """Key that is wanted → the last number that was appended to it; all smaller numbers are taken."""

    def free(self, stem: str) -> str:
        """Return a key for a file, made of the letters and digits of its name."""
        ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
        wanted = re.sub(r"[^A-Za-z0-9]+", "-", ascii_stem)[:60].strip("-") or "sound"
        key, number = wanted, self._last.get(wanted.lower(), 1)
        while key.lower() in self._taken:  # a tar may be unpacked on a case-insensitive file system
            number += 1
            key = f"{wanted}-{number}"
        self._taken.add(key.lower())
        self._last[wanted.lower()] = number
        return key
