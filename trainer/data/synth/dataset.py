"""A small synthesizer of captioned sound effects, which gives training data without a download.

Every sound is a pure function of (seed, index). A set can therefore be planned before it is made, made by any number of
workers, and resumed after a kill, always with the same bytes.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np
import soundfile

from models.atomic_write import remove_leftovers, write_whole
from models.documents import read_json, to_json, write_json
from trainer.data.synth import signals, sounds
from trainer.data.synth.tools import SAMPLE_RATE, Random, low_pass, pick, reverberate, shape, swell
from trainer.data.workers import exit_with_parent, explain_dead_workers

logger = logging.getLogger(__name__)

# Indoor sounds may get the reverberation of a room; outdoor sounds may be moved into the distance.
INDOORS = sounds.INDOORS | signals.INDOORS
OUTDOORS = sounds.OUTDOORS | signals.OUTDOORS
SOUND_RECIPES = INDOORS | OUTDOORS
SOUND_KINDS = tuple(SOUND_RECIPES)
# Raise the version whenever a recipe changes its sound: one folder must not hold sounds of two versions.
SYNTH_VERSION = 1
SHORTEST, LONGEST = 1.5, 5.0  # seconds
PEAK = 0.9
CAPTIONS = "captions.jsonl"
PLAN = "synth.json"


class _Purpose(TypedDict):
    """The content of `synth.json`: what a folder's sounds are made from."""

    hours: float
    seed: int
    version: int


@dataclass(frozen=True, eq=False)
class Sound:
    """One synthesized sound; `audio` is (samples,), float32, at most 0.9 in magnitude."""

    key: str
    kind: str
    caption: str
    audio: np.ndarray
    sample_rate: int = SAMPLE_RATE


def synthesize(seed: int, index: int) -> Sound:
    """Synthesize sound `index` of the set with `seed`; successive sounds cycle through the kinds.

    All platforms give the same sound to 16 bits.
    """
    random = _random(seed, index)
    samples = _draw_samples(random)
    kind = _kind(index)
    caption, sound = SOUND_RECIPES[kind](random, samples)
    where, sound, peak = _surround(random, sound, outdoors=kind in OUTDOORS)
    return Sound(_key(index), kind, caption + where, _finish(random, sound, peak))


def _random(seed: int, index: int) -> Random:
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def _draw_samples(random: Random) -> int:
    """Draw the length of a sound, in samples of whole hundredths of a second.

    The length is the first number drawn, so that finding it does not take a synthesis.
    """
    return round(random.uniform(SHORTEST, LONGEST) * 100) * SAMPLE_RATE // 100


def _kind(index: int) -> str:
    return SOUND_KINDS[index % len(SOUND_KINDS)]


def _key(index: int) -> str:
    return f"{_kind(index)}_{index:05d}"


def _name(index: int) -> str:
    return f"{_key(index)}.flac"


def _surround(random: Random, sound: np.ndarray, *, outdoors: bool) -> tuple[str, np.ndarray, float]:
    """Put the sound into a place; returns the place's words for the caption, the sound as heard there, and its peak."""
    peak = PEAK * 10 ** (-random.uniform(0, 12) / 20)
    if random.random() < 0.6:
        return "", sound, peak
    if outdoors:
        far = shape(sound, partial(low_pass, cutoff=random.uniform(1500, 3500)))
        return ", in the distance", reverberate(random, far, random.uniform(0.4, 0.8), wet=0.25), peak / 3
    where, shortest, longest = pick(random, ((", in a small room", 0.25, 0.5), (", in a large hall", 1.2, 2.2)))
    return where, reverberate(random, sound, random.uniform(shortest, longest), wet=0.4), peak


def _finish(random: Random, sound: np.ndarray, peak: float) -> np.ndarray:
    """Remove inaudible rumble, scale to `peak`, add the faint hiss of a recording, and fade both ends."""
    sound = shape(sound, lambda f: 1 - low_pass(f, 25, 4))
    sound *= peak / np.abs(sound).max()
    sound += 10 ** (random.uniform(-78, -62) / 20) * (2 * random.random(len(sound)) - 1)
    return np.clip(sound * swell(len(sound), 0.005, 0.04), -PEAK, PEAK).astype(np.float32)


def write_sounds(
    folder: Path,
    *,
    hours: float,
    seed: int,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    sole: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> int:
    """Fill a folder with sounds 0, 1, 2, … of the seed until they last `hours`: 16-bit KEY.flac and captions.jsonl.

    A line of captions.jsonl is {"file", "caption", "kind", "seconds"}. The file is written last, so its presence means
    that the folder is complete; one that was edited is kept. A repeated call makes only the missing sounds. The bytes
    depend neither on the workers nor on interruptions. `progress` is called with the sounds done and the number of
    sounds. `sole` gives the folder to this process for as long as it writes, and raises ValueError if it has an owner.

    Returns:
        The number of sounds in the folder.

    Raises:
        ValueError: an argument is out of range, the folder holds something else, or a worker died.
        OSError: a sound can't be written. No partial file is left behind.
    """
    _check(hours=hours, seed=seed, workers=workers)
    _is_claimed(folder, _purpose(hours, seed))
    with sole():
        return _write_missing(folder, hours, seed, workers, progress)


def _write_missing(
    folder: Path, hours: float, seed: int, workers: int, progress: Callable[[int, int], None] | None
) -> int:
    _claim(folder, _purpose(hours, seed))
    lengths = _lengths(seed, hours)
    captions = [_written_caption(folder / _name(index), samples) for index, samples in enumerate(lengths)]
    missing = [index for index, caption in enumerate(captions) if caption is None]
    with closing(_write_all(folder, seed, missing, workers)) as made:  # stops the workers if `progress` raises
        for done, (index, caption) in enumerate(zip(missing, made, strict=True), len(lengths) - len(missing) + 1):
            captions[index] = caption
            if progress:
                progress(done, len(lengths))
    lines = [
        {"file": _name(index), "caption": captions[index], "kind": _kind(index), "seconds": samples / SAMPLE_RATE}
        for index, samples in enumerate(lengths)
    ]
    remove_leftovers(folder)
    text = "".join(to_json(line) + "\n" for line in lines)
    if not (folder / CAPTIONS).exists():
        write_whole(folder / CAPTIONS, text)
    elif (folder / CAPTIONS).read_bytes() != text.encode():
        logger.warning("%s differs from what was synthesized, and is kept as it is", folder / CAPTIONS)
    return len(lengths)


def _check(*, hours: float, seed: int, workers: int) -> None:
    if not 0 < hours < float("inf"):
        raise ValueError(f"hours must be a number above 0, not {hours}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be a whole number from 0 to 2**64 - 1, not {seed}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")


def _purpose(hours: float, seed: int) -> _Purpose:
    return {"hours": float(hours), "seed": seed, "version": SYNTH_VERSION}


def _is_claimed(folder: Path, purpose: _Purpose) -> bool:
    """Whether a folder is for these sounds; False if it is new. Raises ValueError if it holds anything else."""
    plan = folder / PLAN
    if plan.exists():
        mend = "name another folder or delete it"
        held = read_json(plan, _Purpose, mend=mend)
        if held != purpose:
            raise ValueError(f"{folder} holds the sounds of {to_json(held)}, not of {to_json(purpose)}: {mend}")
        return True
    if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
        if plan.exists():  # another process has claimed the folder meanwhile
            return _is_claimed(folder, purpose)
        raise ValueError(f"{folder} holds something other than synthesized sounds: name a new or an empty folder")
    return False


def _claim(folder: Path, purpose: _Purpose) -> None:
    """Record the settings in a new or empty folder. Raises ValueError if the folder holds anything else."""
    if not _is_claimed(folder, purpose):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN, purpose)


def _lengths(seed: int, hours: float) -> list[int]:
    lengths: list[int] = []
    remaining = hours * 3600 * SAMPLE_RATE
    while remaining > 0:
        lengths.append(_draw_samples(_random(seed, len(lengths))))
        remaining -= lengths[-1]
    return lengths


def _written_caption(path: Path, samples: int) -> str | None:
    """Return the caption of an existing sound, which is its file's title, or None if the sound has to be made."""
    if not path.exists():
        return None
    try:
        with soundfile.SoundFile(path) as file:
            return file.title if file.title and file.frames == samples else None
    except soundfile.LibsndfileError:
        return None


def _write_all(folder: Path, seed: int, indices: Sequence[int], workers: int) -> Generator[str, None, None]:
    """Make and write the sounds, and yield their captions in order."""
    write = partial(_write, folder, seed)
    if workers == 1 or len(indices) < 2:
        yield from map(write, indices)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(indices)), mp_context=context, initializer=exit_with_parent)
    with pool, explain_dead_workers():
        yield from pool.map(write, indices, chunksize=4)


def _write(folder: Path, seed: int, index: int) -> str:
    sound = synthesize(seed, index)
    # Encode in memory, because libsndfile does not raise an OSError when the disk is full.
    encoded = io.BytesIO()
    with soundfile.SoundFile(encoded, "w", SAMPLE_RATE, 1, format="FLAC", subtype="PCM_16") as file:
        file.title = sound.caption
        file.write(np.round(sound.audio * 32768).astype(np.int16))
    write_whole(folder / _name(index), encoded.getvalue())
    return sound.caption
