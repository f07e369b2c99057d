"""Divides the work of `prepare` into units of files that fill about one shard each, by the lengths in their headers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import msgspec

from models.disk_errors import NO_FILE, NOT_ALLOWED, patiently
from models.documents import read_json, write_json
from trainer.data.clips import AudioEncoder, clip_starts
from trainer.data.groups import groups, held_out
from trainer.data.origins import TableCell, glimpse
from trainer.data.sound_reader import duration
from trainer.data.sources import SoundFile
from trainer.data.tables import Cells

SPLITS = ("train", "test")
_SAMPLE_OVERHEAD = 4096  # bytes; an upper bound for a sample's JSON and tar headers
_MEND = "remove it, and the lengths are read again"
_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_THREADS = 8  # threads that read headers; on a network file system they mostly wait


@dataclass(frozen=True)
class Unit:
    """Files whose clips fill about one shard."""

    split: str
    number: int
    sources: list[SoundFile]


def sources_fingerprint(sources: Iterable[SoundFile]) -> str:
    """Return a hash that changes with the size, time, caption or facts of any file; raises OSError if a disk fails."""
    digest = blake2b(digest_size=16)
    for source in sources:
        try:
            status = patiently(source.path.stat)
            version = [status.st_size, status.st_mtime_ns]
        except OSError as error:
            if error.errno not in NO_FILE | NOT_ALLOWED:
                raise
            version = []  # a manifest may name missing files
        digest.update(json.dumps([source.name, *version, source.caption, dict(source.facts)]).encode())
    return digest.hexdigest()


def durations(sources: list[SoundFile], memory: Path, patience: float = 0) -> dict[SoundFile, float]:
    """Return the seconds of sound in each file, 0 if its header can't be read; the JSON file `memory` caches them."""
    known = read_json(memory, dict[str, _Seconds], mend=_MEND, finite=True) if memory.exists() else {}
    if not all(source.key in known for source in sources):
        threaded = [source for source in sources if not isinstance(source.origin, TableCell)]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda source: _duration(source, patience), threaded)
            known = {source.key: seconds for source, seconds in zip(threaded, found, strict=True)}
        with closing(Cells(patience)) as cells:  # in their order
            for source in (source for source in sources if isinstance(source.origin, TableCell)):
                known[source.key] = _duration(cells.loaded(source), patience)
        write_json(memory, known)
    return {source: known[source.key] for source in sources}


def _duration(source: SoundFile, patience: float) -> float:
    origin = source.origin
    return duration(source.path, None if origin is None else lambda: glimpse(origin, source.path, patience))


def plan_units(
    seconds: dict[SoundFile, float], ae: AudioEncoder, clip_samples: int, *, holdout: float, seed: int, shard_bytes: int
) -> list[Unit]:
    """Divide files of the given lengths into units of each split, numbered from 0.

    Unreadable files have length 0. They are not held out; encoding them reports the reason.
    """
    group_of = dict(zip(seconds, groups([source.place for source in seconds]), strict=True))
    tested = held_out((group_of[source] for source in seconds if seconds[source]), fraction=holdout, seed=seed)
    units = []
    for split in SPLITS:
        clip_bytes = _SAMPLE_OVERHEAD + 2 * ae.latent_channels * ae.frames(clip_samples)
        if split == "test":
            clip_bytes += 3 * ae.channels * clip_samples
        number, room = -1, 0
        for source in seconds:
            if (group_of[source] in tested) != (split == "test"):
                continue
            size = clip_bytes * len(clip_starts(round(seconds[source] * ae.sample_rate), clip_samples))
            if number < 0 or size > room:
                number, room = number + 1, shard_bytes
                units.append(Unit(split, number, []))
            units[-1].sources.append(source)
            room -= size
    return units
