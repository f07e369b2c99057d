"""A small synthesizer of captioned sound effects: data to train on without a download.

Every sound is a pure function of (seed, index), so a set of them is planned without being made, made by any number of
workers, and made on after a kill, always with the same bytes.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from trainer.data.synth_sounds import INDOORS, OUTDOORS, SAMPLE_RATE, Random, low_pass, pick, reverberate, shape, swell

RECIPES = INDOORS | OUTDOORS
KINDS = tuple(RECIPES)
# Raise it when any recipe sounds different: sets of two versions must not mix in one folder.
VERSION = 1
SHORTEST, LONGEST = 1.5, 5.0  # seconds
PEAK = 0.9
CAPTIONS = "captions.jsonl"
PLAN = "synth.json"


@dataclass(frozen=True)
class Sound:
    """One synthesized sound: `audio` is (samples,), float32, at most 0.9 in magnitude."""

    key: str
    kind: str
    caption: str
    audio: np.ndarray
    sample_rate: int = SAMPLE_RATE


def synthesize(seed: int, index: int) -> Sound:
    """Sound number `index` of the set that `seed` names; the kinds go round. The same on every platform to 16 bits."""
    random = _random(seed, index)
    samples = _draw_samples(random)
    kind = KINDS[index % len(KINDS)]
    caption, sound = RECIPES[kind](random, samples)
    where, sound, peak = _surround(random, sound, outdoors=kind in OUTDOORS)
    return Sound(_key(index), kind, caption + where, _finish(random, sound, peak))


def _random(seed: int, index: int) -> Random:
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def _draw_samples(random: Random) -> int:
    """The length of a sound, in whole hundredths of a second: the first number drawn, so that a plan needs nothing else."""
    return round(random.uniform(SHORTEST, LONGEST) * 100) * SAMPLE_RATE // 100


def _key(index: int) -> str:
    return f"{KINDS[index % len(KINDS)]}_{index:05d}"


def _surround(random: Random, sound: np.ndarray, *, outdoors: bool) -> tuple[str, np.ndarray, float]:
    """Where the sound is heard: words for the caption, the sound as heard there, and its peak."""
    peak = PEAK * 10 ** (-random.uniform(0, 12) / 20)
    if random.random() < 0.6:
        return "", sound, peak
    if outdoors:
        far = shape(sound, partial(low_pass, cutoff=random.uniform(1500, 3500)))
        return ", in the distance", reverberate(random, far, random.uniform(0.4, 0.8), wet=0.25), peak / 3
    where, shortest, longest = pick(random, ((", in a small room", 0.25, 0.5), (", in a large hall", 1.2, 2.2)))
    return where, reverberate(random, sound, random.uniform(shortest, longest), wet=0.4), peak


def _finish(random: Random, sound: np.ndarray, peak: float) -> np.ndarray:
    """Without rumble below hearing, at the given peak, over the faint hiss of any recording, faded at both ends."""
    sound = shape(sound, lambda f: 1 - low_pass(f, 25, 4))
    sound *= peak / np.abs(sound).max()
    sound += 10 ** (random.uniform(-78, -62) / 20) * (2 * random.random(len(sound)) - 1)
    return np.clip(sound * swell(len(sound), 0.005, 0.04), -PEAK, PEAK).astype(np.float32)
