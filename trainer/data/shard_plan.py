"""Divides the work of `prepare` into units of files that fill about one shard each, by the lengths in their headers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import msgspec

from models.documents import damaged, read_json, write_json
from trainer.data.clips import AudioEncoder, clip_starts
from trainer.data.sound_files import SoundFile, held_out
from trainer.data.sound_reader import duration

SPLITS = ("train", "test")
_SAMPLE_OVERHEAD = 4096  # bytes; an upper bound for a sample's JSON and tar headers
_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_THREADS = 8  # threads that read headers; on a network file system they mostly wait


@dataclass(frozen=True)
class Unit:
    """Files whose clips fill about one shard."""

    split: str
    number: int
    sources: list[SoundFile]


def sources_fingerprint(sources: Iterable[SoundFile]) -> str:
    """Return a hash that changes with the size, time, caption or facts of any file."""
    digest = blake2b(digest_size=16)
    for source in sources:
        try:
            status = source.path.stat()
            version = [status.st_size, status.st_mtime_ns]
        except OSError:  # a manifest may name missing files
            version = []
        digest.update(json.dumps([source.name, *version, source.caption, dict(source.facts)]).encode())
    return digest.hexdigest()


def durations(sources: list[SoundFile], memory: Path) -> dict[SoundFile, float]:
    """Return the seconds of sound in each file, 0 if its header can't be read; the JSON file `memory` caches them."""
    if memory.exists():
        mend = "remove it, and the lengths are read again"
        known = read_json(memory, dict[str, _Seconds], mend=mend, finite=True)
        if missing := next((source.name for source in sources if source.name not in known), None):
            raise damaged(memory, f"it lacks {missing}", mend)
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda source: duration(source.path), sources)
            known = {source.name: seconds for source, seconds in zip(sources, found, strict=True)}
        write_json(memory, known)
    return {source: known[source.name] for source in sources}


def plan_units(
    seconds: dict[SoundFile, float], ae: AudioEncoder, clip_samples: int, *, holdout: float, seed: int, shard_bytes: int
) -> list[Unit]:
    """Divide files of the given lengths into units of each split, numbered from 0.

    Unreadable files have length 0. They are not held out; encoding them reports the reason.
    """
    tested = held_out((source.base_name for source in seconds if seconds[source]), fraction=holdout, seed=seed)
    units = []
    for split in SPLITS:
        clip_bytes = _SAMPLE_OVERHEAD + 2 * ae.latent_channels * ae.frames(clip_samples)
        if split == "test":
            clip_bytes += 3 * ae.channels * clip_samples
        number, room = -1, 0
        for source in seconds:
            if (source.base_name in tested) != (split == "test"):
                continue
            size = clip_bytes * len(clip_starts(round(seconds[source] * ae.sample_rate), clip_samples))
            if number < 0 or size > room:
                number, room = number + 1, shard_bytes
                units.append(Unit(split, number, []))
            units[-1].sources.append(source)
            room -= size
    return units
