"""Finds out what `data.audio` names: folders, manifests, tars and tables, on this machine or at URLs."""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from models.documents import parse_json
from models.readable import file_trouble
from trainer.data.bucket import SourceError, SourceFile, bucket_at, split_url
from trainer.data.find_sounds import SUFFIXES, Counts, find_files
from trainer.data.origins import local_file, read_bytes
from trainer.data.remote import MissingFileError, is_url
from trainer.data.sources import MANIFESTS
from trainer.file_names import printable
from trainer.urls import has_credentials, without_credentials

TABLES = (".parquet", ".arrow")
_CONTAINERS = (".tar", *TABLES)
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".zip")
_STATE = "state.json"
"""File of `datasets.save_to_disk` that names the files of the set."""
_CACHED = re.compile(r"cache-[^/]*\.arrow|tmp[^/]*\.arrow")
"""Intermediate results of `datasets` beside the set itself."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_SPLIT = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?=[-_./]|$)")
_MOST_PLACES, _MOST_TROUBLES = 1_000_000, 5
_KINDS = (
    f"a folder of sounds, a manifest ({', '.join(MANIFESTS)}), a tar, a table ({', '.join(TABLES)}) or a URL of one"
)


@dataclass(frozen=True)
class Asked:
    """What the recipe says of its sounds."""

    audio: str | Path
    """A path, a URL, or a pattern with braces."""
    audio_column: str | None = None
    caption_column: str | None = None
    patience: float = 600.0
    """Seconds to retry a request for."""
    own: tuple[Path, ...] = ()
    """Directories of the run, in which no sounds are looked for."""


@dataclass(frozen=True)
class Located:
    """A place that holds sounds."""

    kind: str
    """`folder`, `manifest`: of this machine; `bucket`, `listed`: the same at a URL; `tars`; `tables`."""
    place: str
    """Path or URL."""
    files: Mapping[str, SourceFile] = field(default_factory=dict)
    """Name relative to the place → the file. Empty for a folder or a manifest of this machine."""
    passed_over: Counts = field(default_factory=Counts)

    @property
    def told(self) -> str:
        """The place, for people."""
        return without_credentials(printable(self.place))


def expand_braces(pattern: str) -> list[str]:
    """Return all texts that a pattern stands for, in order, as a shell does: `{000..099}`, `{a,b}`.

    Raises:
        ValueError: they are too many.
    """
    parts, at, count = list[Sequence[str]](), 0, 1
    for match in _BRACES.finditer(pattern):
        parts += [[pattern[at : match.start()]], _choices(match[1])]
        at, count = match.end(), count * len(parts[-1])
        if count > _MOST_PLACES:
            raise ValueError(f"data.audio={pattern} stands for more than {_MOST_PLACES:,} places: give a folder")
    return ["".join(chosen) for chosen in itertools.product(*parts, [pattern[at:]])]


def _choices(text: str) -> Sequence[str]:
    """Return what the text in a pair of braces stands for."""
    if bounds := _RANGE.fullmatch(text):
        first, last = int(bounds[1]), int(bounds[2])
        step, width = 1 if first <= last else -1, len(bounds[1]) if bounds[1][0] == "0" else 0
        if abs(last - first) > _MOST_PLACES:
            return [""] * (_MOST_PLACES + 1)
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    return text.split(",") if "," in text else [f"{{{text}}}"]


def places(audio: str | Path) -> list[str]:
    """Return the paths and URLs that `data.audio` names: one, or those that its braces stand for."""
    if not isinstance(audio, str) or "{" not in audio or (not is_url(audio) and Path(audio).exists()):
        return [str(audio)]
    return [place.strip() for place in expand_braces(audio)]


def is_plain(place: str) -> bool:
    """Whether a place is a folder or a manifest of this machine; it may also be a folder of tars or of tables."""
    return not is_url(place) and (Path(place).suffix.lower() in MANIFESTS or Path(place).is_dir())


def audio_troubles(audio: str) -> list[str]:
    """Return why `data.audio` names no sounds, a line each for the first places; asks no server."""
    if has_credentials(audio):
        return [
            f"data.audio={without_credentials(audio)} holds credentials, which configs and logs would show: leave them "
            f"out, and give them in the store's own environment, such as AWS_ACCESS_KEY_ID"
        ]
    try:
        return list(itertools.islice((line for place in places(audio) if (line := _trouble(place))), _MOST_TROUBLES))
    except ValueError as error:
        return [str(error)]


def _trouble(place: str) -> str:
    """Return why a place holds no sounds, as far as a path tells it; empty if it may hold some."""
    name, told = place.rstrip("/").lower(), f"data.audio={without_credentials(place)}"
    if name.endswith(_COMPRESSED) and not Path(place).is_dir():
        return f"{told} is compressed, which rules out random access: unpack it, and give the tar or the folder"
    if is_url(place) or Path(place).is_dir():
        return ""
    if Path(place).is_file():
        return "" if name.endswith((*MANIFESTS, *_CONTAINERS)) else f"{told} is neither: give {_KINDS}"
    return f"{told} {'is neither' if Path(place).exists() else file_trouble(Path(place))}: give {_KINDS}"


def locate(asked: Asked) -> list[Located]:
    """Return the places that `data.audio` names, in its order.

    Raises:
        ValueError: there is nothing, or what is there is not clear.
        SourceError: a server can't be asked.
    """
    return [_locate(place, list(asked.own), asked.patience) for place in places(asked.audio)]


def _locate(place: str, own: list[Path], patience: float) -> Located:
    if problem := _trouble(place):
        raise ValueError(problem)
    if is_url(place):
        return _at_url(place.rstrip("/"), patience)
    path = Path(place)
    if path.is_dir():
        return _folder(path, own, patience)
    if path.suffix.lower() in MANIFESTS:
        return Located("manifest", place)
    return Located(_kind_of(path.name), place, {path.name: local_file(path)})


def _kind_of(name: str) -> str:
    return "tars" if name.lower().endswith(".tar") else "tables"


def _folder(folder: Path, own: list[Path], patience: float) -> Located:
    """Return a folder of this machine, which holds sounds, or else tars or tables."""
    if find_files(folder, SUFFIXES, own=own).files:
        return Located("folder", str(folder))
    found = find_files(folder, _CONTAINERS, own=own)
    if not found.files:
        return Located("folder", str(folder))  # `find_sounds` says what it holds
    files = {path.relative_to(folder).as_posix(): path for path in found.files}
    states = {path.relative_to(folder).as_posix(): path for path in _states(folder, files)}
    named = _of_sets(str(folder), files, states, lambda name: states[name].read_bytes())
    return _containers(str(folder), {name: local_file(files[name]) for name in named}, files, found.passed_over)


def _states(folder: Path, files: Iterable[str]) -> Iterator[Path]:
    folders = sorted({posixpath.dirname(name) for name in files})
    return (path for path in (folder / name / _STATE for name in folders) if path.is_file())


def _at_url(url: str, patience: float) -> Located:
    folder, name = split_url(url)
    if name.lower().endswith((*MANIFESTS, *_CONTAINERS)):
        try:
            stored = bucket_at(folder, patience).stored(name)
        except MissingFileError as error:
            if "is a folder" not in str(error):
                raise ValueError(f"data.audio: {error}") from error
        else:
            kind = "listed" if name.lower().endswith(MANIFESTS) else _kind_of(name)
            return Located(kind, url, {name: stored})
    files = _listed(url, patience)
    if any(name.lower().endswith(SUFFIXES) and not _is_hidden(name) for name in files):
        return Located("bucket", url, files)
    containers = [name for name in files if name.lower().endswith(_CONTAINERS) and not _is_hidden(name)]
    if not containers:
        raise ValueError(f"data.audio={without_credentials(url)} holds no sound, or lists none: {_name_files(url)}")
    states = [name for name in files if posixpath.basename(name) == _STATE]
    named = _of_sets(url, containers, states, lambda name: read_bytes(files[name], 0, files[name].size, patience))
    passed_over = Counts()
    for name in sorted(files.keys() - set(containers)):
        passed_over.add(posixpath.splitext(name)[1].lower() or "without suffix", name)
    return _containers(url, {name: files[name] for name in named}, containers, passed_over)


def _listed(url: str, patience: float) -> dict[str, SourceFile]:
    try:
        return bucket_at(url, patience).files()
    except SourceError as error:
        if url.lower().startswith("http") and "is denied" in str(error):
            raise ValueError(f"{error}; a server that lists no files: {_name_files(url)}") from error
        raise


def _name_files(url: str) -> str:
    return f"give {_KINDS}, such as '{without_credentials(url)}/NAME-{{000..099}}.tar'"


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _of_sets(place: str, names: Iterable[str], states: Iterable[str], read: Callable[[str], bytes]) -> list[str]:
    """Return the names without intermediate results of `datasets`; where a state says which files are the set, those.

    Raises:
        ValueError: a state is damaged, or names a file that is missing.
    """
    names, said = sorted(names), {}
    for state in states:
        mend = "save the set again with `save_to_disk`, or give its files"
        entry = parse_json(read(state), dict[str, object], f"{place}/{state}", mend=mend)
        listed = entry.get("_data_files")
        if isinstance(listed, list):
            folder = posixpath.dirname(state)
            of_set = [str(file.get("filename")) for file in listed if isinstance(file, dict)]
            said[folder] = [posixpath.join(folder, name) for name in of_set]
            if missing := sorted(set(said[folder]) - set(names)):
                raise ValueError(f"{place}/{state} names {printable(missing[0])}, which is missing: copy the whole set")
    kept = (name for name in names if posixpath.dirname(name) not in said)
    others = [name for name in kept if not _CACHED.fullmatch(posixpath.basename(name))]
    return sorted([*others, *(name for listed in said.values() for name in listed)])


def _containers(place: str, files: dict[str, SourceFile], all_names: Iterable[str], passed_over: Counts) -> Located:
    kinds = {_kind_of(name) for name in files}
    if len(kinds) != 1:
        raise ValueError(
            f"data.audio={without_credentials(place)} holds tars and tables, and it is not clear which: give one of "
            f"them, such as '{without_credentials(place)}/NAME-{{000..099}}.tar'"
        )
    for name in sorted(set(all_names) - files.keys()):
        passed_over.add("files that `datasets` keeps beside a set", name)
    return Located(kinds.pop(), place, files, passed_over)


def splits_of(located: Iterable[Located]) -> list[str]:
    """Return the splits that the names of files say they are of, if these are several."""
    found = {
        match[1] for one in located if one.kind in ("tars", "tables") for name in one.files
        for match in [_SPLIT.search(name.lower())] if match
    }  # fmt: skip
    return sorted(found) if len(found) > 1 else []
