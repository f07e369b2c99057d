"""What synthesized sounds are made of: random numbers, noise and tones, filters, envelopes, modes, bubbles, echoes.

Of the generator only `random()` and `uniform()` are used: their numbers are plain arithmetic on its bits, which won't
change from one NumPy to the next as those of cleverer calls may.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

SAMPLE_RATE = 48_000
FRAME = 1024  # of `moving_noise`: 21 ms, overlapped by half
HOP = FRAME // 2
BINS = np.fft.rfftfreq(FRAME, 1 / SAMPLE_RATE)

Random = np.random.Generator
Recipe = Callable[[Random, int], tuple[str, np.ndarray]]
Range = tuple[float, float]
T = TypeVar("T")


# --- drawing numbers ---


def pick(random: Random, options: Sequence[T]) -> T:
    """One of the options, each as likely."""
    return options[int(random.random() * len(options))]


def log_uniform(random: Random, low: float, high: float) -> float:
    """As likely in one octave as in the next: how pitches, sizes and loudnesses are spread."""
    return low * (high / low) ** random.random()


def pick_value(random: Random, ranges: dict[str, Range]) -> tuple[str, float]:
    """A word, and a value out of the range that the word stands for."""
    word = pick(random, list(ranges))
    return word, log_uniform(random, *ranges[word])


def beat(random: Random, samples: int, interval: float, *, jitter: float = 0.1) -> np.ndarray:
    """Starts, in samples, of an event that is repeated every `interval` seconds, give or take jitter, until the end."""
    most = int(samples / SAMPLE_RATE / (interval * (1 - jitter))) + 1
    steps = interval * random.uniform(1 - jitter, 1 + jitter, most)
    starts = random.uniform(0.01, 0.12) + np.concatenate(([0.0], np.cumsum(steps)))
    starts = (starts * SAMPLE_RATE).astype(int)
    return starts[starts < samples - SAMPLE_RATE // 8]  # what starts later would hardly be heard


def wander(random: Random, samples: int, per_second: float, low: float, high: float) -> np.ndarray:
    """A smooth random track (samples,) between low and high, which turns `per_second` times a second."""
    position = np.arange(samples) * (per_second / SAMPLE_RATE) + random.random()
    left = position.astype(int)
    ease = position - left
    ease = ease * ease * (3 - 2 * ease)
    knots = random.uniform(low, high, left[-1] + 2)
    return knots[left] * (1 - ease) + knots[left + 1] * ease


# --- making and shaping sound ---


def noise(random: Random, samples: int) -> np.ndarray:
    """White, uniform in [-1, 1): once filtered it can't be told from Gaussian noise."""
    return 2 * random.random(samples) - 1


def fast_length(samples: int) -> int:
    """The next length with no prime factor above 7, which a Fourier transform likes."""
    step = 1 << max(samples.bit_length() - 3, 0)
    return -(-samples // step) * step


def shape(sound: np.ndarray, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Filters without a shift of phase; `gain` maps frequencies in Hz to factors."""
    length = fast_length(len(sound))
    spectrum = np.fft.rfft(sound, length) * gain(np.fft.rfftfreq(length, 1 / SAMPLE_RATE))
    return np.fft.irfft(spectrum, length)[: len(sound)]


def convolve(sound: np.ndarray, response: np.ndarray) -> np.ndarray:
    """`sound` through `response`, cut to the length of `sound`."""
    length = fast_length(len(sound) + len(response))
    return np.fft.irfft(np.fft.rfft(sound, length) * np.fft.rfft(response, length), length)[: len(sound)]


def low_pass(frequencies: np.ndarray, cutoff: float | np.ndarray, order: float = 2) -> np.ndarray:
    """A gain that is 1 far below the cutoff, a half at it, and falls by 6 dB · order an octave far above."""
    return 1 / (1 + (frequencies / cutoff) ** order)


def bump(frequencies: np.ndarray, centre: float | np.ndarray, octaves: float) -> np.ndarray:
    """A bell curve over the logarithm of frequency, `octaves` its standard deviation."""
    return np.exp(-0.5 * (np.log2(np.maximum(frequencies, 1) / centre) / octaves) ** 2)


def moving_noise(random: Random, samples: int, gain: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Noise under a gain that moves: `gain(frequencies (1, bins), frame centres in samples (frames, 1))`."""
    frames = samples // HOP + 2
    halves = noise(random, (frames + 1) * HOP).reshape(-1, HOP)
    window = np.sin(np.pi * (np.arange(FRAME) + 0.5) / FRAME)
    centres = np.minimum(np.arange(frames) * HOP, samples - 1)
    spectrum = np.fft.rfft(np.concatenate((halves[:-1], halves[1:]), axis=1) * window)
    pieces = np.fft.irfft(spectrum * gain(BINS[None], centres[:, None])) * window
    return (pieces[1:, :HOP] + pieces[:-1, HOP:]).ravel()[:samples]


def ring(frequencies: np.ndarray, decays: np.ndarray, amplitudes: np.ndarray, samples: int) -> np.ndarray:
    """Damped sines, the modes of a struck body: Hz, seconds to -60 dB, amplitudes; those above 20 kHz are left out."""
    heard = frequencies < 20_000
    pole = (2j * np.pi * frequencies[heard] - np.log(1000) / decays[heard]) / SAMPLE_RATE
    # exp(pole·(256 a + b)) = exp(pole·256 a) · exp(pole·b): two short tables instead of a long one for each mode.
    coarse = np.exp(np.outer(np.arange(0, samples, 256), pole)) * (-1j * amplitudes[heard])
    return (coarse @ np.exp(np.outer(pole, np.arange(256)))).real.ravel()[:samples]


def add(sound: np.ndarray, event: np.ndarray, start: int) -> None:
    """Adds the event into the sound in place; what lies past the end is dropped."""
    part = sound[start : start + len(event)]
    part += event[: len(part)]


def sing(frequency: np.ndarray, overtones: Sequence[float] = (1.0,)) -> np.ndarray:
    """A tone along a track of frequencies in Hz, with an amplitude for each multiple of it; none above 20 kHz."""
    phase = 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE
    tone = np.zeros(len(phase))
    for number, level in enumerate(overtones, 1):
        if level and number * frequency.max() < 20_000:
            tone += level * np.sin(number * phase)
    return tone


def swell(samples: int, attack: float, release: float) -> np.ndarray:
    """An envelope (samples,) that rises over `attack` seconds, stays at 1 and falls over `release` seconds to 0."""
    time = np.arange(samples)
    edges = np.minimum(time / (attack * SAMPLE_RATE), (samples - time) / (release * SAMPLE_RATE))
    return np.sin(np.pi / 2 * np.clip(edges, 0, 1)) ** 2


def fade_away(samples: int, decay: float) -> np.ndarray:
    """An exponential decay (samples,), `decay` seconds to -60 dB."""
    return np.exp(np.arange(samples) * (-np.log(1000) / (decay * SAMPLE_RATE)))


def sparks(random: Random, samples: int, per_second: float, *, evenness: float = 0.3) -> np.ndarray:
    """Clicks of one sample at random times; the less even, the fewer of them are loud."""
    count = int(per_second * samples / SAMPLE_RATE) + 1
    places = (random.random(count) * samples).astype(int)
    clicks = np.zeros(samples)
    np.add.at(clicks, places, random.random(count) ** (1 / evenness) * np.sign(random.random(count) - 0.5))
    return clicks


def grain(random: Random, low: float, high: float, decay: float, *, modes: int = 4) -> np.ndarray:
    """A tiny struck thing (a pebble, a twig, a drop on tin): a few modes between low and high Hz."""
    frequencies = low * (high / low) ** random.random(modes)
    decays = decay * random.uniform(0.5, 1.5, modes)
    amplitudes = random.uniform(0.3, 1, modes) * SAMPLE_RATE / (2 * np.pi * frequencies)
    # What is heard is how fast it moves, not how far: so small a thing can't push the air at low frequencies.
    return np.diff(ring(frequencies, decays, amplitudes, int(1.5 * decay * SAMPLE_RATE)), append=0)


def bubble(frequency: float, decay: float, rise: float) -> np.ndarray:
    """A bubble of air in water: a damped sine, whose pitch rises by `rise` of itself as it nears the surface."""
    samples = int(decay * SAMPLE_RATE)
    time = np.arange(samples) / SAMPLE_RATE
    return np.sin(2 * np.pi * frequency * time * (1 + rise / 2 * time / decay)) * fade_away(samples, decay)


def claps(random: Random, samples: int, starts: np.ndarray, decay: Range) -> np.ndarray:
    """The envelope (samples,) of bursts at `starts` that die in `decay` seconds."""
    envelope = np.zeros(samples)
    for start in starts:
        add(envelope, random.uniform(0.4, 1) * fade_away(samples, random.uniform(*decay)), start)
    return envelope


def reverberate(random: Random, sound: np.ndarray, decay: float, *, wet: float) -> np.ndarray:
    """The sound in a room whose echoes take `decay` seconds to fall by 60 dB, `wet` of the energy theirs."""
    length = int(decay * SAMPLE_RATE)
    echoes = shape(noise(random, length) * fade_away(length, decay), partial(low_pass, cutoff=5000, order=1))
    echoes *= np.sqrt(wet / np.sum(echoes**2))
    echoes[0] += np.sqrt(1 - wet)
    return convolve(sound, echoes)
