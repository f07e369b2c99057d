"""The sounds of everything that `data.audio` may name, and a record of them, so that servers are asked once.

A sound keeps the name that it has in its tar, table or bucket, so that the sets are those of a folder with the same
names. If two sounds have one name, each is named with its tar or row before it. The order is that of the places, and
in a tar or a table that of its members and rows, which is the quickest to read.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from models.atomic_write import replacing
from models.documents import damaged
from models.regular_file import open_regular
from trainer.data.find_sounds import SUFFIXES, Counts, find_sounds
from trainer.data.list_places import Sound, list_place
from trainer.data.locate import Asked, Located, locate, splits_of
from trainer.data.origins import Origin
from trainer.data.remote import is_url
from trainer.data.shard_plan import sources_fingerprint
from trainer.data.sources import Keys, SoundFile, Sources, find_sources
from trainer.data.tables import ParquetRows
from trainer.file_names import as_unicode, printable

_RECORD = "sounds.jsonl"
_MEND = "remove it, and the sounds are listed again"
_MOST_NAMED, _FEW = 10_000, 3
_SPLITS_TOGETHER = (
    "splits that are used together, as data.holdout chooses what is held out; name the files of one to use it alone"
)


class _Header(msgspec.Struct):
    """The first line of the record."""

    passed_over: dict[str, Any]
    captions: dict[str, Any]


class _Row(msgspec.Struct):
    """Another line of the record: a sound."""

    name: str
    key: str
    caption: str
    facts: dict[str, Any]
    origin: Origin | None
    path: str


@dataclass
class AllSources:
    """The sounds of a recipe.

    Attributes:
        plain: the folder or manifest of this machine, if the recipe names that alone.
        fingerprint: changes with any file; see `sources_fingerprint`.
    """

    asked: Asked
    located: list[Located]
    plain: Path | None
    fingerprint: str
    _found: Sources | None = field(default=None, repr=False)

    def listed(self, work: Path | None = None) -> Sources:
        """Return all sounds, from the record in the folder `work` if it is there, which is made else.

        Raises:
            ValueError: there is no sound, or a tar or table can't be read.
            SourceError: a server can't be asked.
        """
        if self._found is None:
            record = None if work is None or self.plain is not None else work / _RECORD
            self._found = _read_record(record) if record is not None and record.exists() else self._list(record)
        return self._found

    @property
    def is_remote(self) -> bool:
        """Whether any place is at a URL."""
        return any(is_url(one.place) for one in self.located)

    def files(self) -> dict[str, list[object]]:
        """Return the size and version of each file that holds sounds, by its place; the first 10,000."""
        found = [stored for one in self.located for stored in one.files.values()]
        return {stored.told: [stored.size, stored.version] for stored in found[:_MOST_NAMED]}

    def _list(self, record: Path | None) -> Sources:
        sources = _all_sounds(self.asked, self.located)
        if record is not None:
            _write_record(record, sources)
        return sources


def open_sources(asked: Asked) -> AllSources:
    """Find out what the recipe names. Only a folder or a manifest of this machine is listed at once.

    Raises:
        ValueError, SourceError: see `locate` and `find_sources`.
    """
    located = locate(asked)
    if len(located) == 1 and located[0].kind in ("folder", "manifest"):
        path = Path(located[0].place)
        sources = find_sources(path, own=asked.own)
        return AllSources(asked, located, path, sources_fingerprint(sources.files), sources)
    digest = blake2b(digest_size=16)
    digest.update(json.dumps([asked.audio_column, asked.caption_column]).encode())
    for one in located:
        facts: list[object] = [one.kind, *([name, file.size, file.version] for name, file in one.files.items())]
        if one.kind in ("folder", "manifest"):
            facts.append(sources_fingerprint(find_sources(Path(one.place), own=asked.own).files))
        digest.update(json.dumps(facts).encode())
    return AllSources(asked, located, None, digest.hexdigest())


def describe(asked: Asked) -> str:
    """Return what the recipe names in a line: kinds, files, bytes, and how many sounds if that is known at once.

    Raises:
        ValueError, SourceError: see `locate`.
    """
    located = locate(asked)
    kinds, files = Counter(one.kind for one in located), [file for one in located for file in one.files.values()]
    what = ", ".join(f"{count} × {_WORDS[kind]}" if count > 1 else _WORDS[kind] for kind, count in kinds.items())
    size = f", {len(files):,} file(s) of {sum(file.size for file in files) / 2**30:,.2f} GiB" if files else ""
    counts = [_count(one, asked) for one in located]
    sounds = f", {sum(filter(None, counts)):,} sounds" if None not in counts else ""
    told = printable(", ".join(one.told for one in located[:_FEW]))
    return f"{told}{' …' if len(located) > _FEW else ''}: {what}{size}{sounds}"


def _count(one: Located, asked: Asked) -> int | None:
    """Return the number of sounds in a place if it is known without reading much; else None."""
    if one.kind == "folder":
        return len(find_sounds(Path(one.place), own=asked.own).files)
    if one.kind == "bucket":
        return sum(name.lower().endswith(SUFFIXES) for name in one.files)
    if one.kind == "tables" and len(one.files) <= _FEW and all(name.lower().endswith(".parquet") for name in one.files):
        return sum(sum(ParquetRows(file, asked.patience).groups) for file in one.files.values())
    return None


_WORDS = {
    "folder": "a folder of sounds",
    "manifest": "a manifest",
    "bucket": "sounds at a URL",
    "listed": "a manifest at a URL",
    "tars": "tars of sounds",
    "tables": "tables of sounds",
}


# ---- Listing ---------------------------------------------------------------------------------------------------------


def _all_sounds(asked: Asked, located: list[Located]) -> Sources:
    passed_over, notes, keys = Counts(), Counts(), Keys()
    sounds = [sound for one in located for sound in list_place(one, asked, passed_over, notes)]
    if splits := splits_of(located):
        notes.add(_SPLITS_TOGETHER, ", ".join(splits))
    if not sounds:
        besides = f"; it holds {passed_over}" if passed_over.kinds else ""
        raise ValueError(f"data.audio={', '.join(one.told for one in located[:3])} holds no sound{besides}")
    files = []
    for name, (_, source) in zip(_unique_names(sounds), sounds, strict=True):
        key = keys.free(source.place[1] if source.origin is not None else source.path.stem)
        path = Path(name) if source.origin else source.path
        files.append(replace(source, name=name, key=key, path=path, facts=_plain(dict(source.facts))))
    return Sources(files, passed_over, notes)


def _plain(value: Any) -> Any:
    """Return a value of JSON as the record and all readers of JSON have it: numbers that are not finite are None."""
    if isinstance(value, dict):
        return {as_unicode(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return as_unicode(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unique_names(sounds: list[Sound]) -> list[str]:
    """Return a name for each sound that no other one has: its own, with what tells it apart before it if need be."""
    count = Counter(source.name for _, source in sounds)
    names = [source.name if count[source.name] == 1 else f"{home}/{source.name}" for home, source in sounds]
    count, taken = Counter(names), Counter[str]()
    known = set(names)
    for number, name in enumerate(names):
        if count[name] > 1:
            while names[number] in known:  # a sound may have the name that another one would get
                taken[name] += 1
                names[number] = f"{taken[name]}/{name}"
            known.add(names[number])
    return names


# ---- The record ------------------------------------------------------------------------------------------------------


def _write_record(path: Path, sources: Sources) -> None:
    """Write a header, a line for each sound, and a hash of all these lines."""
    digest, encoder = blake2b(digest_size=16), msgspec.json.Encoder()
    with replacing(path) as partial, partial.open("wb") as file:

        def write(row: _Header | _Row) -> None:
            line = encoder.encode(row) + b"\n"
            digest.update(line)
            file.write(line)

        write(_Header(sources.passed_over.report(), sources.captions.report()))
        for one in sources.files:
            write(_Row(one.name, one.key, one.caption, dict(one.facts), one.origin, str(one.path)))
        file.write(encoder.encode(digest.hexdigest()))


def _read_record(path: Path) -> Sources:
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            return _sources_in(file)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise damaged(path, error, _MEND) from None


def _sources_in(lines: Iterable[bytes]) -> Sources:
    """Return the sources of a record; raises ValueError, KeyError or TypeError if it is damaged."""
    digest, decoder, header = blake2b(digest_size=16), msgspec.json.Decoder(_Row), b""
    files: list[SoundFile] = []
    for line in lines:
        if not line.endswith(b"\n"):
            if line != msgspec.json.encode(digest.hexdigest()):
                break
            found = msgspec.json.decode(header, type=_Header)
            return Sources(files, Counts.of(found.passed_over), Counts.of(found.captions))
        if header:
            row = decoder.decode(line)
            files.append(SoundFile(Path(row.path), row.name, row.key, row.caption, row.facts, row.origin))
        header = header or line
        digest.update(line)
    raise ValueError("its lines are not those of its checksum")
