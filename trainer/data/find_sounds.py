"""Finds the sound files below a folder, and counts all else that lies there.

A link to a folder is followed. Every folder and every linked file is used once: under its own path if that lies below
the folder, else under the first link that leads to it. What an own run wrote is no sound to learn from, so run
directories are passed over.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Self

from models.disk_errors import NO_FILE, NOT_ALLOWED, PASSING, patiently, with_number
from trainer.file_names import as_unicode, printable
from trainer.stages import STAGES

SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".mp3", ".m4a", ".aac", ".opus", ".aif", ".aiff", ".oga", ".mp2", ".mp4", ".m4b"),
    *(".webm", ".mka", ".wma", ".wave", ".bwf", ".rf64", ".w64", ".aifc", ".caf", ".au", ".snd"),
)
"""Suffixes of sound files, in any case."""
CAPTIONS = "captions.jsonl"
"""The file of captions of a folder of sounds."""
_SIDECARS = (".txt", ".json")
_NAMED, _KINDS = 1000, 1000  # names listed of a kind, and kinds told apart
_SHOWN = 8  # kinds in a line for the user
_OF_A_RUN = (*STAGES, "latents")
"""Folders that a run writes into its directory, apart from `audio`, which holds the sounds of `synth`."""
RECORDS = (".encoded.jsonl", "encode.report.json", "decode.report.json", ".owner.json", ".owner.lock")
"""Files that `encode` and `decode` leave in a folder, or keep there meanwhile, which are not counted."""
_OF_PREPARE = ("report.json", ".prepare", ".prepare.lock")


@dataclass
class Counts:
    """What was found besides, by kind: an exact number of each kind, and the first names of each."""

    kinds: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Count one of a kind."""
        kind = as_unicode(kind)
        if kind not in self.kinds and len(self.kinds) >= _KINDS:
            kind = "of other kinds"
        self.kinds[kind] += 1
        listed = self.names.setdefault(kind, [])
        if len(listed) < _NAMED:
            listed.append(as_unicode(name))

    def add_all(self, other: Counts) -> None:
        """Count what another one has counted."""
        for kind, count in other.kinds.items():
            for name in other.names[kind]:
                self.add(kind, name)
            self.kinds[kind] += count - len(other.names[kind])

    def __str__(self) -> str:
        return summary_of(self.report())

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Self:
        """Return the counts of which `report` made a report."""
        kinds = Counter({kind: entry["count"] for kind, entry in report.items()})
        return cls(kinds, {kind: list(entry["names"]) for kind, entry in report.items()})

    def report(self) -> dict[str, Any]:
        """Return the counts and names as plain values, sorted by kind."""
        return {kind: {"count": count, "names": self.names[kind]} for kind, count in sorted(self.kinds.items())}


def summary_of(report: Mapping[str, Any]) -> str:
    """Return a report of `Counts` as a line such as `.jpg (12), hidden (3)`, the most frequent kinds first."""
    ranking = sorted((-kind["count"], name) for name, kind in report.items())
    shown = [f"{printable(name)} ({-count:,})" for count, name in ranking[:_SHOWN]]
    rest = -sum(count for count, _ in ranking[_SHOWN:])
    return ", ".join([*shown, *([f"others ({rest:,})"] if rest else [])])


@dataclass
class Found:
    """The files below a folder."""

    files: list[Path] = field(default_factory=list)
    """The files with a wanted suffix, sorted by relative path."""
    passed_over: Counts = field(default_factory=Counts)
    """All else, by suffix or by reason."""


def find_audio(folder: Path) -> list[Path]:
    """Return the sound files of `find_sounds`."""
    return find_sounds(folder).files


def find_sounds(folder: Path, *, own: Iterable[Path] = ()) -> Found:
    """Find all sound files below a folder by suffix; hidden files and folders and run directories are passed over.

    A pipe, a device, a broken link and an empty file count as sound files if they have the suffix of one: whoever reads
    them names them. `models.regular_file` says so without waiting for a pipe.

    Args:
        folder: the folder.
        own: directories that this run writes. One of them that is `folder` itself is searched, apart from the folders
            of its stages.

    Raises:
        ValueError: the folder is missing, can't be listed or holds no sound files.
    """
    found = find_files(folder, SUFFIXES, own=own)
    if not found.files:
        besides = f"; it holds {found.passed_over}" if found.passed_over.kinds else ""
        raise ValueError(f"{folder} holds no sound: give a folder with sound files ({', '.join(SUFFIXES)}){besides}")
    return found


def find_files(folder: Path, suffixes: tuple[str, ...], *, own: Iterable[Path] = ()) -> Found:
    """Find all files below a folder with one of these suffixes, in any case; raises ValueError as `find_sounds`."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one that holds sound files")
    walk = _Walk(folder, suffixes, {os.path.realpath(path) for path in own})
    walk.run()
    files, passed_over = walk.files, walk.passed_over
    if walk.linked:
        known = {real for _, real in files}
        for name, real in sorted(walk.linked):
            if real in known:
                passed_over.add("links to a file that is found anyway", name)
            else:
                known.add(real)
                files.append((name, real))
    return Found([folder / name for name in sorted(name for name, _ in files)], passed_over)


class _Walk:
    """One search of a folder. Names are relative to the folder, real paths are absolute and have no links in them."""

    def __init__(self, root: Path, suffixes: tuple[str, ...], own: set[str]) -> None:
        self.root, self.suffixes, self.own = root, suffixes, own
        self.files: list[tuple[str, str]] = []
        """Name and real path of each file that is no link."""
        self.linked: list[tuple[str, str]] = []
        """Name and real path of each link to a file."""
        self.passed_over = Counts()
        self._folders: list[tuple[str, str]] = [("", os.path.realpath(root))]
        self._links: deque[tuple[str, str]] = deque()
        self._seen = {self._folders[0][1]}

    def run(self) -> None:
        """Search the folder: first all that lies in it, then what its links lead to."""
        while self._folders or self._links:
            if self._folders:
                self._search(*self._folders.pop())
            else:
                self._follow(*self._links.popleft())

    def _search(self, name: str, real: str) -> None:
        try:
            entries = patiently(lambda: _listed(self.root / name))
        except OSError as error:
            told = f"{self.root / name} can't be listed: {error.strerror}"
            raise (
                with_number(error.errno, told) if error.errno in PASSING - NOT_ALLOWED else ValueError(told)
            ) from error
        if name and _is_run_directory(self.root / name, {entry.name for entry in entries}):
            self.passed_over.add("directories of runs", name)
            return
        sounding = {PurePath(entry.name).stem for entry in entries if self._is_wanted(entry.name)}
        first = len(self._folders)
        for entry in entries:
            path = f"{name}/{entry.name}" if name else entry.name
            if entry.name in RECORDS:
                continue
            if entry.name.startswith("."):
                self.passed_over.add("hidden", path)
            elif entry.is_symlink():
                self._take_link(path, real, entry)
            elif entry.is_dir(follow_symlinks=False):
                self._take_folder(path, f"{real.rstrip('/')}/{entry.name}")
            elif self._is_wanted(entry.name):
                self.files.append((path, f"{real.rstrip('/')}/{entry.name}"))
            elif not is_caption(entry.name, sounding):
                self._pass_over(path)
        self._folders[first:] = reversed(self._folders[first:])  # the last one is searched next

    def _is_wanted(self, name: str) -> bool:
        return name.lower().endswith(self.suffixes)

    def _pass_over(self, path: str) -> None:
        self.passed_over.add(PurePath(path).suffix.lower() or "without suffix", path)

    def _take_link(self, path: str, real: str, entry: os.DirEntry[str]) -> None:
        target = os.path.realpath(entry.path)
        if _is_folder(entry):
            if f"{real.rstrip('/')}/".startswith(f"{target.rstrip('/')}/"):
                self.passed_over.add("links to a folder above them", path)
            else:
                self._links.append((path, target))
        elif self._is_wanted(entry.name):
            self.linked.append((path, target))
        else:
            self._pass_over(path)

    def _take_folder(self, path: str, real: str) -> None:
        if self._is_wanted(path):
            self.passed_over.add("folders that are named like a file", path)
        if real in self._seen:
            self.passed_over.add("folders that a link leads to", path)
        elif real in self.own or any(real == f"{run}/{folder}" for run in self.own for folder in _OF_A_RUN):
            self.passed_over.add("directories of this run", path)
        else:
            self._seen.add(real)
            self._folders.append((path, real))

    def _follow(self, path: str, real: str) -> None:
        if real in self._seen:
            self.passed_over.add("links to a folder that is searched anyway", path)
        else:
            self._take_folder(path, real)


def _is_run_directory(folder: Path, names: set[str]) -> bool:
    """Whether a run wrote the folder, which holds these names: `prepare`, a stage, or the pipeline left its records."""
    if "latents" in names and any((folder / "latents" / name).exists() for name in _OF_PREPARE):
        return True
    stages = [folder / stage for stage in STAGES if stage in names]
    if any((stage / "config.yaml").is_file() and (stage / "inputs.json").is_file() for stage in stages):
        return True
    return bool(stages) and "config.yaml" in names and _is_config(folder / "config.yaml")


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as listing:
        return sorted(listing, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return patiently(entry.is_dir)
    except OSError as error:
        if error.errno not in NO_FILE | NOT_ALLOWED:
            raise  # a folder whose disk failed would be left out without a word
        return False  # a link to itself, or to what may not be read


def _is_config(path: Path) -> bool:
    def read() -> bool:
        with path.open(encoding="utf-8", errors="replace") as file:
            return any(line.startswith("run_dir:") for line in file)

    try:
        return patiently(read)
    except OSError as error:
        if error.errno not in NO_FILE | NOT_ALLOWED:
            raise
        return False


def is_caption(name: str, sounding: set[str]) -> bool:
    """Whether a file holds captions, in a folder of sounds with these stems."""
    path = PurePath(name)
    return name == CAPTIONS or (path.suffix in _SIDECARS and path.stem in sounding)
