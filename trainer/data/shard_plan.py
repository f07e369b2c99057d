"""How the work of `prepare` is cut: into units of files that fill about a shard, by what the files' headers say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from models.atomic_write import write_whole
from trainer.data.audio import duration
from trainer.data.clips import AudioEncoder, clip_starts
from trainer.data.sound_files import SoundFile, held_out

SPLITS = ("train", "test")
_SAMPLE_OVERHEAD = 4096  # bytes, more than a sample's JSON and tar headers take
_THREADS = 8  # that read headers: on a network's file system it is waiting most of the time


@dataclass(frozen=True)
class Unit:
    """Files whose clips fill about a shard."""

    split: str
    number: int
    sources: list[SoundFile]


def sources_fingerprint(sources: Iterable[SoundFile]) -> str:
    """Changes with any file, or with what is told of it."""
    digest = blake2b(digest_size=16)
    for source in sources:
        try:
            status = source.path.stat()
            of_file = [status.st_size, status.st_mtime_ns]
        except OSError:  # a manifest may name what is not there
            of_file = []
        digest.update(json.dumps([source.name, *of_file, source.caption, dict(source.facts)]).encode())
    return digest.hexdigest()


def durations(sources: list[SoundFile], memory: Path) -> dict[SoundFile, float]:
    """Seconds of sound in each file, 0 where its header can't be read; written to `memory`, or read from there."""
    if memory.is_file():
        known = json.loads(memory.read_text(encoding="utf-8"))
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda source: duration(source.path), sources)
            known = {source.name: seconds for source, seconds in zip(sources, found, strict=True)}
        write_whole(memory, json.dumps(known))
    return {source: known[source.name] for source in sources}


def plan_units(
    seconds: dict[SoundFile, float], ae: AudioEncoder, clip_samples: int, *, holdout: float, seed: int, shard_bytes: int
) -> list[Unit]:
    """Share out files of these lengths; those of 0 count nothing, and why is found out later."""
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
