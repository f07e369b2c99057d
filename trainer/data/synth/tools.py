"""The building blocks of synthesized sounds: random draws, noise, tones, filters, envelopes, modes and echoes.

Only `random()` and `uniform()` of the generator are used: they are plain arithmetic on the generator's bits. The other
methods may give other numbers in another version of NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

SAMPLE_RATE = 48_000
FRAME = 1024  # samples per frame of `moving_noise`: 21 ms, with 50 % overlap
HOP = FRAME // 2
BINS = np.fft.rfftfreq(FRAME, 1 / SAMPLE_RATE)

Random = np.random.Generator
Recipe = Callable[[Random, int], tuple[str, np.ndarray]]
Range = tuple[float, float]
T = TypeVar("T")


# --- drawing numbers ---


def pick(random: Random, options: Sequence[T]) -> T:
    """Draw one of the options with equal probability."""
    return options[int(random.random() * len(options))]


def log_uniform(random: Random, low: float, high: float) -> float:
    """Draw a value from low to high, uniform in its logarithm, as pitches, sizes and loudnesses are distributed."""
    return low * (high / low) ** random.random()


def pick_value(random: Random, ranges: dict[str, Range]) -> tuple[str, float]:
    """Draw a word, and a value from the word's range."""
    word = pick(random, list(ranges))
    return word, log_uniform(random, *ranges[word])


def beat(random: Random, samples: int, interval: float, *, jitter: float = 0.1) -> np.ndarray:
    """Return the starts, in samples, of an event repeated every `interval` seconds; `jitter` is a fraction of that."""
    most = int(samples / SAMPLE_RATE / (interval * (1 - jitter))) + 1
    steps = interval * random.uniform(1 - jitter, 1 + jitter, most)
    starts = random.uniform(0.01, 0.12) + np.concatenate(([0.0], np.cumsum(steps)))
    starts = (starts * SAMPLE_RATE).astype(int)
    return starts[starts < samples - SAMPLE_RATE // 8]  # an event that starts later would hardly be audible


def wander(random: Random, samples: int, per_second: float, low: float, high: float) -> np.ndarray:
    """Return a smooth random track (samples,) between low and high, with `per_second` new values per second."""
    position = np.arange(samples) * (per_second / SAMPLE_RATE) + random.random()
    left = position.astype(int)
    ease = position - left
    ease = ease * ease * (3 - 2 * ease)
    knots = random.uniform(low, high, left[-1] + 2)
    return knots[left] * (1 - ease) + knots[left + 1] * ease


# --- making and shaping sound ---


def noise(random: Random, samples: int) -> np.ndarray:
    """Return white noise (samples,), uniform in [-1, 1); after filtering it sounds like Gaussian noise."""
    return 2 * random.random(samples) - 1


def fast_length(samples: int) -> int:
    """Return the next length without a prime factor above 7, for a fast Fourier transform."""
    step = 1 << max(samples.bit_length() - 3, 0)
    return -(-samples // step) * step


def shape(sound: np.ndarray, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Filter with zero phase; `gain` maps frequencies in Hz to factors."""
    length = fast_length(len(sound))
    spectrum = np.fft.rfft(sound, length) * gain(np.fft.rfftfreq(length, 1 / SAMPLE_RATE))
    return np.fft.irfft(spectrum, length)[: len(sound)]


def convolve(sound: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolve `sound` with `response`; the result has the length of `sound`."""
    length = fast_length(len(sound) + len(response))
    return np.fft.irfft(np.fft.rfft(sound, length) * np.fft.rfft(response, length), length)[: len(sound)]


def low_pass(frequencies: np.ndarray, cutoff: float | np.ndarray, order: float = 2) -> np.ndarray:
    """Return a gain of 1 far below the cutoff, 1/2 at the cutoff, and -6 dB · order per octave far above."""
    return 1 / (1 + (frequencies / cutoff) ** order)


def bump(frequencies: np.ndarray, centre: float | np.ndarray, octaves: float) -> np.ndarray:
    """Return a bell curve over log frequency, with a standard deviation of `octaves`."""
    return np.exp(-0.5 * (np.log2(np.maximum(frequencies, 1) / centre) / octaves) ** 2)


def moving_noise(random: Random, samples: int, gain: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Return noise with a time-varying gain: `gain(frequencies (1, bins), frame centres in samples (frames, 1))`."""
    frames = samples // HOP + 2
    halves = noise(random, (frames + 1) * HOP).reshape(-1, HOP)
    window = np.sin(np.pi * (np.arange(FRAME) + 0.5) / FRAME)
    centres = np.minimum(np.arange(frames) * HOP, samples - 1)
    spectrum = np.fft.rfft(np.concatenate((halves[:-1], halves[1:]), axis=1) * window)
    pieces = np.fft.irfft(spectrum * gain(BINS[None], centres[:, None])) * window
    return (pieces[1:, :HOP] + pieces[:-1, HOP:]).ravel()[:samples]


def ring(frequencies: np.ndarray, decays: np.ndarray, amplitudes: np.ndarray, samples: int) -> np.ndarray:
    """Sum damped sines, the modes of a struck body, each with its Hz, seconds to -60 dB and amplitude.

    Modes above 20 kHz are left out.
    """
    audible = frequencies < 20_000
    pole = (2j * np.pi * frequencies[audible] - np.log(1000) / decays[audible]) / SAMPLE_RATE
    # exp(pole·(256 a + b)) = exp(pole·256 a) · exp(pole·b): two short tables instead of a long one per mode.
    coarse = np.exp(np.outer(np.arange(0, samples, 256), pole)) * (-1j * amplitudes[audible])
    return (coarse @ np.exp(np.outer(pole, np.arange(256)))).real.ravel()[:samples]


def add(sound: np.ndarray, event: np.ndarray, start: int) -> None:
    """Add the event to the sound in place; the part after the sound's end is dropped."""
    part = sound[start : start + len(event)]
    part += event[: len(part)]


def sing(frequency: np.ndarray, overtones: Sequence[float] = (1.0,)) -> np.ndarray:
    """Return a tone that follows a track of frequencies in Hz, with the given amplitude per harmonic below 20 kHz."""
    phase = 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE
    tone = np.zeros(len(phase))
    for number, level in enumerate(overtones, 1):
        if level and number * frequency.max() < 20_000:
            tone += level * np.sin(number * phase)
    return tone


def swell(samples: int, attack: float, release: float) -> np.ndarray:
    """Return an envelope (samples,) that rises in `attack` seconds, stays at 1 and falls to 0 in `release` seconds."""
    time = np.arange(samples)
    edges = np.minimum(time / (attack * SAMPLE_RATE), (samples - time) / (release * SAMPLE_RATE))
    return np.sin(np.pi / 2 * np.clip(edges, 0, 1)) ** 2


def fade_away(samples: int, decay: float) -> np.ndarray:
    """Return an exponential decay (samples,) that reaches -60 dB after `decay` seconds."""
    return np.exp(np.arange(samples) * (-np.log(1000) / (decay * SAMPLE_RATE)))


def sparks(random: Random, samples: int, per_second: float, *, evenness: float = 0.3) -> np.ndarray:
    """Return one-sample clicks at random times; a lower `evenness` makes fewer clicks loud."""
    count = int(per_second * samples / SAMPLE_RATE) + 1
    places = (random.random(count) * samples).astype(int)
    clicks = np.zeros(samples)
    np.add.at(clicks, places, random.random(count) ** (1 / evenness) * np.sign(random.random(count) - 0.5))
    return clicks


def grain(random: Random, low: float, high: float, decay: float, *, modes: int = 4) -> np.ndarray:
    """Return the sound of a tiny struck thing (pebble, twig, drop on tin): a few modes between low and high Hz."""
    frequencies = low * (high / low) ** random.random(modes)
    decays = decay * random.uniform(0.5, 1.5, modes)
    amplitudes = random.uniform(0.3, 1, modes) * SAMPLE_RATE / (2 * np.pi * frequencies)
    # Take the velocity instead of the displacement, because so small a thing radiates little at low frequencies.
    return np.diff(ring(frequencies, decays, amplitudes, int(1.5 * decay * SAMPLE_RATE)), append=0)


def bubble(frequency: float, decay: float, rise: float) -> np.ndarray:
    """Return the sound of a bubble in water: a damped sine whose pitch rises by the fraction `rise`."""
    samples = int(decay * SAMPLE_RATE)
    time = np.arange(samples) / SAMPLE_RATE
    return np.sin(2 * np.pi * frequency * time * (1 + rise / 2 * time / decay)) * fade_away(samples, decay)


def claps(random: Random, samples: int, starts: np.ndarray, decay: Range) -> np.ndarray:
    """Return the envelope (samples,) of bursts at `starts`, each of which decays in a random time from `decay` (s)."""
    envelope = np.zeros(samples)
    for start in starts:
        add(envelope, random.uniform(0.4, 1) * fade_away(samples, random.uniform(*decay)), start)
    return envelope


def reverberate(random: Random, sound: np.ndarray, decay: float, *, wet: float) -> np.ndarray:
    """Put the sound into a room: echoes fall by 60 dB in `decay` seconds and take the fraction `wet` of the energy."""
    length = int(decay * SAMPLE_RATE)
    echoes = shape(noise(random, length) * fade_away(length, decay), partial(low_pass, cutoff=5000, order=1))
    echoes *= np.sqrt(wet / np.sum(echoes**2))
    echoes[0] += np.sqrt(1 - wet)
    return convolve(sound, echoes)
