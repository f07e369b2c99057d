"""The recipes of the synthesizer: twenty kinds of sound effects, physical (modes, bubbles) or procedural (noise).

A recipe takes a random generator and a number of samples, and gives a caption and that many samples, at any level.
Captions fit because a recipe draws a word first, then a value out of the range that the word stands for.
Of the generator only `random()` and `uniform()` are used: their numbers are plain arithmetic on its bits, which won't
change from one NumPy to the next as those of cleverer calls may.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

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


# --- struck bodies ---


class Material(NamedTuple):
    """What a struck body is made of."""

    things: dict[str, Range]  # with the range of the lowest mode in Hz
    blows: str
    modes: int
    spread: Range  # mode k lies near k ** spread times the lowest: 1 a string, 2 a bar
    decay: Range  # of the lowest mode, seconds to -60 dB
    damping: float  # how much faster high modes die: decay ∝ ratio ** -damping
    contact: Range  # the noise of the blow itself, beside the modes


MATERIALS = {
    "wood": Material(
        {"a heavy wooden door": (70, 130), "a wooden table": (140, 280), "a small wooden box": (300, 700)},
        "knocks", 10, (1.2, 1.7), (0.12, 0.35), 0.6, (0.2, 0.6),
    ),
    "metal": Material(
        {"an iron plate": (110, 300), "a steel pipe": (350, 800), "a small metal bowl": (900, 1800)},
        "clangs", 22, (0.9, 1.4), (0.7, 2.6), 0.35, (0.05, 0.3),
    ),
    "stone": Material(
        {"a heavy boulder": (170, 380), "a stone slab": (450, 1100), "a pebble": (1600, 3200)},
        "raps", 12, (0.8, 1.3), (0.06, 0.18), 0.3, (0.5, 1.2),
    ),
}  # fmt: skip
PACES = {"slow": (0.55, 0.85), "steady": (0.32, 0.5), "rapid": (0.13, 0.24)}
HARDNESSES = {"soft": (1.2, 1.8), "hard": (0.25, 0.7)}


def _impact(random: Random, samples: int, *, material: Material) -> tuple[str, np.ndarray]:
    thing, pitch = pick_value(random, material.things)
    pace, interval = pick_value(random, PACES)
    hardness, dulling = pick_value(random, HARDNESSES)
    ratios = np.arange(1, material.modes + 1) ** random.uniform(*material.spread)
    ratios *= random.uniform(0.93, 1.07, material.modes)
    decays = random.uniform(*material.decay) * ratios**-material.damping * random.uniform(0.6, 1.4, material.modes)
    contact = random.uniform(*material.contact)
    length = min(samples, int(1.4 * decays.max() * SAMPLE_RATE))

    def blow() -> np.ndarray:
        where = random.uniform(-1, 1, material.modes)  # which modes a blow excites depends on where it falls
        event = ring(pitch * ratios, decays, where * ratios**-dulling, length)
        touch = noise(random, length // 2) * fade_away(length // 2, 0.03)
        add(event, contact * shape(touch, partial(low_pass, cutoff=8 * pitch / dulling)), 0)
        return event

    blows = [blow() for _ in range(4)]
    sound = np.zeros(samples)
    for start in beat(random, samples, interval):
        add(sound, pick(random, blows) * log_uniform(random, 0.4, 1), start)
    return f"{pace}, {hardness} {material.blows} on {thing}", sound


BELLS = {  # lowest strong partial in Hz, seconds between strokes, seconds to -60 dB
    "a church bell tolls": ((170, 420), (0.9, 1.6), (3.5, 6)),
    "a ship's bell rings": ((600, 1000), (0.45, 0.9), (1.5, 3)),
    "a hand bell rings quickly": ((1000, 1700), (0.16, 0.28), (0.8, 1.6)),
    "a bicycle bell trills": ((1800, 2600), (0.06, 0.09), (0.5, 1)),
}
BELL_PARTIALS = np.array([0.5, 1, 1.2, 1.5, 2, 2.5, 2.67, 3, 4.1, 5.4, 6.8, 8.2])


def _bell(random: Random, samples: int) -> tuple[str, np.ndarray]:
    caption, (pitches, intervals, decays) = pick(random, list(BELLS.items()))
    partials = BELL_PARTIALS * random.uniform(0.985, 1.015, len(BELL_PARTIALS)) * log_uniform(random, *pitches)
    # No bell is quite round: each partial is a pair, whose slow beating makes the tone waver.
    frequencies = np.concatenate((partials, partials + random.uniform(0.3, 3, len(partials))))
    decay = np.tile(random.uniform(*decays) * BELL_PARTIALS**-0.7, 2)
    amplitudes = np.tile(BELL_PARTIALS**-0.8, 2) * random.uniform(0.3, 1, len(frequencies))
    stroke = ring(frequencies, decay, amplitudes, samples)
    sound = np.zeros(samples)
    for start in beat(random, samples, log_uniform(random, *intervals), jitter=0.05):
        add(sound, stroke * random.uniform(0.6, 1), start)
    return caption, sound


def _glass(random: Random, samples: int) -> tuple[str, np.ndarray]:
    thing, size = pick_value(random, {
        "glass jar": (1.3, 1.8),
        "glass bottle": (0.8, 1.2),
        "window pane": (0.4, 0.7),
    })
    sound = np.zeros(samples)
    starts = beat(random, samples, random.uniform(1.1, 1.6))
    for start in starts:
        crack = noise(random, SAMPLE_RATE // 5) * fade_away(SAMPLE_RATE // 5, 0.12 / size)
        add(sound, 1.5 * shape(crack, lambda f: 1 - low_pass(f, 1800 * size)), start)
        for _ in range(int(40 / size)):  # the shards fly, and ring as they land
            shard = grain(random, 1800 * size, 9000 * size, log_uniform(random, 0.03, 0.25), modes=3)
            add(sound, log_uniform(random, 0.05, 0.7) * shard, start + int(SAMPLE_RATE * 0.9 * random.random() ** 2))
    return f"a {thing} shatters" if len(starts) == 1 else f"{thing}s shatter one after another", sound


# --- walking, wood, fire ---

GAITS = {"slow": (0.66, 0.85), "steady": (0.5, 0.6), "brisk": (0.38, 0.46), "running": (0.26, 0.33)}


def _footsteps(random: Random, samples: int) -> tuple[str, np.ndarray]:
    gait, interval = pick_value(random, GAITS)
    surface = pick(random, ("gravel", "a wooden floor", "snow"))
    press = np.zeros(samples)  # how hard the foot presses: heel, then toe
    starts = beat(random, samples, interval, jitter=0.06)
    roll = 0.3 * min(interval, 0.55)
    for start in starts:
        for delay, weight in ((0.0, 1.0), (roll, 0.7)):
            length = int(SAMPLE_RATE * roll * random.uniform(0.9, 1.5))
            step = weight * random.uniform(0.6, 1) * swell(length, 0.1 * roll, roll)
            add(press, step, start + int(delay * SAMPLE_RATE))
    if surface == "gravel":
        pebbles = press * sparks(random, samples, random.uniform(900, 2200))
        stones = press * sparks(random, samples, 200)
        sound = convolve(pebbles, grain(random, 1200, 7000, 0.008, modes=8))
        sound += 0.5 * convolve(stones, grain(random, 400, 1800, 0.02))
    elif surface == "snow":
        crush = press**2 * sparks(random, samples, random.uniform(5000, 9000)) * wander(random, samples, 60, 0, 1)
        sound = shape(crush, partial(bump, centre=random.uniform(700, 1500), octaves=1.0))
    else:
        heel = grain(random, 70, 400, random.uniform(0.12, 0.25), modes=8)
        add(heel, 0.5 * grain(random, 800, 3500, 0.03), 0)
        clicks = np.zeros(samples)
        for start in starts:
            clicks[start] = random.uniform(0.6, 1)
        sound = convolve(clicks + 0.004 * press * noise(random, samples), heel)
    return f"footsteps on {surface}, {gait}", sound


def _door(random: Random, samples: int) -> tuple[str, np.ndarray]:
    size, pitch = pick_value(random, {
        "a heavy wooden door": (130, 260),
        "an old wooden chest": (280, 480),
        "a cupboard door": (500, 900),
    })
    manner, rate = pick_value(random, {"slowly": (25, 50), "": (60, 100), "shrilly": (140, 260)})
    # The hinge sticks and slips, so many times a second; each slip is a jerk that shakes the wood.
    jerks = wander(random, samples, random.uniform(1.5, 3), 0.4 * rate, 1.6 * rate)
    jerks *= wander(random, samples, 40, 0.85, 1.15)
    slips = np.diff(np.floor(np.cumsum(jerks) / SAMPLE_RATE), prepend=0)
    pressure = np.clip(wander(random, samples, random.uniform(2, 4), -0.3, 1), 0.06, 1)
    body = grain(random, pitch, 12 * pitch, random.uniform(0.03, 0.07), modes=12)
    sound = convolve(slips * pressure * random.uniform(0.7, 1, samples), body)
    return " ".join(f"{size} creaks {manner}".split()), sound


def _fire(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, size = pick_value(random, {
        "a small fire crackles": (0.1, 0.2),
        "a campfire crackles": (0.4, 0.7),
        "a large fire roars and crackles": (1.5, 3),
    })
    roar = shape(noise(random, samples), lambda f: low_pass(f, 250, 1.5) * f / (f + 40))
    sound = 0.6 * size**0.7 * roar * wander(random, samples, 9, 0.4, 1)
    for low, high, decay, rate in ((2500, 9000, 0.004, 50), (1200, 5000, 0.007, 24), (500, 2200, 0.012, 9)):
        clicks = sparks(random, samples, rate * random.uniform(0.6, 1.6), evenness=0.4)
        sound += convolve(clicks * wander(random, samples, 3, 0.1, 1), grain(random, low, high, decay, modes=6))
    return name, sound


# --- air and weather ---


WINDS = {"a gentle breeze": (0.3, 0), "gusty wind": (0.7, 0), "howling wind": (0.85, 3)}  # depth of gusts, howl


def _wind(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, (depth, howl) = pick(random, list(WINDS.items()))
    gust = wander(random, samples, random.uniform(0.7, 1.5), 1 - depth, 1) * wander(random, samples, 5, 0.8, 1)
    base, tone = random.uniform(150, 400), random.uniform(350, 800)

    def gain(frequencies: np.ndarray, at: np.ndarray) -> np.ndarray:
        force = gust[at]
        broad = low_pass(frequencies, base * (0.4 + 2 * force), 1.6) + 0.08 * low_pass(frequencies, 3000 * force)
        return force**1.5 * (broad + howl * force * bump(frequencies, tone * (0.5 + force), 0.06)) * (frequencies > 30)

    return name, moving_noise(random, samples, gain)


def _whoosh(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, pitch = pick_value(random, {
        "a sword swishes through the air": (1800, 4000),
        "a stick swings through the air": (800, 1500),
        "something heavy whooshes past": (200, 500),
    })
    length = log_uniform(random, 0.8, 1.3) * (400 / pitch) ** 0.6 * 0.9
    speed = np.full(samples, 0.01)
    for start in beat(random, samples, min(0.9, length + random.uniform(0.1, 0.4)), jitter=0.2):
        swing = int(length * SAMPLE_RATE)
        add(speed, random.uniform(0.6, 1) * swell(swing, 0.6 * length, 0.4 * length), start)

    def gain(frequencies: np.ndarray, at: np.ndarray) -> np.ndarray:
        centre = pitch * (0.35 + speed[at])
        return speed[at] ** 2 * (bump(frequencies, centre, 0.35) + 0.15 * bump(frequencies, 2.5 * centre, 0.8))

    return name, moving_noise(random, samples, gain)


ROOFS = {  # Hz, and seconds that what a drop falls on rings
    "leaves": ((500, 900), 0.006),
    "a window": ((1000, 1800), 0.012),
    "a tin roof": ((1800, 3000), 0.05),
}


def _rain(random: Random, samples: int) -> tuple[str, np.ndarray]:
    force, drops = pick_value(random, {"light": (40, 90), "steady": (150, 300), "heavy": (600, 1200)})
    roof, (pitches, ringing) = pick(random, list(ROOFS.items()))
    pitch = log_uniform(random, *pitches)
    hiss = shape(noise(random, samples), lambda f: bump(f, 4 * pitch, 1.3))
    sound = 0.0015 * drops**0.6 * hiss * wander(random, samples, 1, 0.6, 1)
    for _ in range(3):
        patter = sparks(random, samples, drops / 3, evenness=0.35)
        sound += convolve(patter, grain(random, 0.6 * pitch, 4 * pitch, ringing, modes=6)) / 3
    return f"{force} rain on {roof}", sound


def claps(random: Random, samples: int, starts: np.ndarray, decay: Range) -> np.ndarray:
    """The envelope (samples,) of bursts at `starts` that die in `decay` seconds."""
    envelope = np.zeros(samples)
    for start in starts:
        add(envelope, random.uniform(0.4, 1) * fade_away(samples, random.uniform(*decay)), start)
    return envelope


def _thunder(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, nearness = pick_value(random, {
        "low thunder rumbles": (0.05, 0.12),
        "thunder rolls": (0.25, 0.45),
        "a sharp clap of thunder, then a rumble": (0.9, 1.5),
    })
    starts = beat(random, samples, random.uniform(0.35, 0.7), jitter=0.7)
    rumble = claps(random, samples, starts, (1.5, 4)) * wander(random, samples, 7, 0.3, 1)
    crack = claps(random, samples, starts[:1], (0.4, 1)) * nearness

    def gain(frequencies: np.ndarray, at: np.ndarray) -> np.ndarray:
        low = low_pass(frequencies, 60 + 120 * nearness + 100 * rumble[at], 2.5)
        return (rumble[at] * low + crack[at] * low_pass(frequencies, 200 + 6000 * crack[at])) * (frequencies > 30)

    return name, moving_noise(random, samples, gain)


def _explosion(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, size = pick_value(random, {
        "a firecracker bangs": (0.3, 0.5),
        "an explosion": (0.8, 1.2),
        "a huge, deep explosion": (1.8, 2.6),
    })
    starts = beat(random, samples, 0.5 + 0.4 * size, jitter=0.3)
    blast = claps(random, samples, starts, (1.2 * size, 2.2 * size))
    thump = claps(random, samples, starts, (0.3 * size, 0.5 * size)) * sing(np.full(samples, 62 / size**0.6))
    debris = convolve(sparks(random, samples, 120, evenness=0.15) * blast, grain(random, 700, 5000, 0.02, modes=6))

    def gain(frequencies: np.ndarray, at: np.ndarray) -> np.ndarray:
        return blast[at] * low_pass(frequencies, 80 + 2500 * blast[at] ** 2 / size, 1.8) * (frequencies > 30)

    sound = 2 * moving_noise(random, samples, gain) + 0.5 * size * thump + 0.3 * debris
    return name + (", then more" if len(starts) > 1 else ""), np.tanh(2 * sound)


# --- water ---


def _drips(random: Random, samples: int) -> tuple[str, np.ndarray]:
    place, echo = pick_value(random, {"a sink": (0.15, 0.3), "a bucket": (0.4, 0.6), "a cave": (1.5, 2.5)})
    pace, interval = pick_value(random, {"slowly": (0.5, 0.8), "steadily": (0.25, 0.4), "quickly": (0.1, 0.16)})
    pitch = log_uniform(random, 600, 1800)
    sound = np.zeros(samples)
    for start in beat(random, samples, interval, jitter=0.2):
        drop = bubble(pitch * log_uniform(random, 0.8, 1.25), random.uniform(0.06, 0.14), random.uniform(0.1, 0.5))
        add(sound, random.uniform(0.5, 1) * drop, start + int(random.uniform(0.005, 0.02) * SAMPLE_RATE))
        add(sound, 0.2 * grain(random, 2500, 8000, 0.006), start)  # the drop meets the surface before its bubble sings
    return f"water drips {pace} into {place}", reverberate(random, sound, echo, wet=0.35)


def _stream(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, flow = pick_value(random, {
        "a brook trickles": (40, 70),
        "a stream babbles": (110, 180),
        "a river rushes": (220, 320),
    })
    sound = np.zeros(samples)
    for _ in range(int(flow * samples / SAMPLE_RATE)):
        frequency = log_uniform(random, 350, 3500)  # small bubbles sing high and die fast
        event = bubble(frequency, 25 / frequency * random.uniform(0.7, 1.6), random.uniform(0, 0.5))
        add(sound, random.random() ** 3 * (600 / frequency) ** 0.3 * event, int(random.random() * samples))
    rush = shape(noise(random, samples), lambda f: bump(f, 1200, 1.4))
    return name, sound + 0.0012 * flow * rush * wander(random, samples, 3, 0.5, 1)


# --- machines and signals ---


ENGINES = {  # strokes a second, how far the driver's foot plays with them, how many times more of them at the end
    "a car engine idles": ((24, 32), (0.98, 1.02), 1.0),
    "a truck's diesel engine idles": ((15, 21), (0.98, 1.02), 1.0),
    "a car engine revs up and down": ((45, 70), (0.6, 2.2), 1.0),
    "a motorbike accelerates": ((50, 80), (0.95, 1.05), 2.8),
}


def _engine(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, (rates, play, gain) = pick(random, list(ENGINES.items()))
    cylinders = pick(random, (3, 4, 6))
    speed = log_uniform(random, *rates) * np.geomspace(1, gain, samples)
    speed *= wander(random, samples, random.uniform(0.9, 1.6), *play) * wander(random, samples, 8, 0.97, 1.03)
    cycle = np.cumsum(speed) / SAMPLE_RATE
    force = random.uniform(0.6, 1, cylinders)[cycle.astype(int) % cylinders]  # no two cylinders fire alike
    fire = force * np.exp(random.uniform(6, 20) * (-np.cos(2 * np.pi * cycle) - 1))
    breath = noise(random, samples) * (0.2 + fire)
    body = random.uniform(0.9, 1.1) * np.array([90, 210, 480, 1100, 2600])
    loud = random.uniform(0.3, 1, len(body))

    def resonances(frequencies: np.ndarray) -> np.ndarray:
        peaks = bump(frequencies[:, None], body, 0.25) @ loud
        return 0.3 * low_pass(frequencies, 900, 1.2) + peaks

    return name, shape(fire + random.uniform(0.3, 1) * breath, resonances) * (speed / speed.max()) ** 0.5


SIRENS = {  # swings a second, lowest Hz, how many octaves up, how abruptly
    "a police siren wails": ((0.25, 0.5), (450, 700), (0.9, 1.2), 1),
    "a police siren yelps": ((2.5, 4.5), (450, 700), (0.7, 1.1), 1),
    "a two-tone siren sounds": ((0.8, 1.4), (430, 650), (0.35, 0.5), 40),
    "an air-raid siren howls": ((0.12, 0.2), (200, 300), (0.9, 1.1), 1),
}


def _siren(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, (rates, lows, heights, abruptness) = pick(random, list(SIRENS.items()))
    turns = np.arange(samples) * (random.uniform(*rates) / SAMPLE_RATE) + random.random()
    swing = np.clip(0.5 + 0.5 * abruptness * np.sin(2 * np.pi * turns), 0, 1)
    pitch = log_uniform(random, *lows) * 2 ** (random.uniform(*heights) * swing)
    tone = sing(pitch, (1, 0.45, 0.3, 0.12, 0.08, 0.04))
    if random.random() < 0.4:
        return f"{name}, growing louder", tone * np.geomspace(0.12, 1, samples)
    return name, tone * wander(random, samples, 2, 0.8, 1)


ALARMS = {  # Hz, seconds of a beep, seconds between beeps, beeps in a group, seconds between groups, overtones
    "an alarm clock beeps": ((1900, 2600), 0.06, 0.06, 4, 0.45, (1, 0, 0.33, 0, 0.2)),
    "a smoke alarm beeps": ((2900, 3400), 0.4, 0.3, 3, 0.6, (1, 0.1, 0.2)),
    "a reversing truck beeps": ((1000, 1300), 0.45, 0.5, 1, 0.5, (1, 0.2, 0.3, 0.1)),
    "a heart monitor beeps": ((850, 1050), 0.12, 0.65, 1, 0.65, (1, 0.05)),
    "an electronic buzzer sounds": ((320, 480), 0.5, 0.2, 1, 0.2, (1, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2)),
}


def _alarm(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, (pitches, on, off, group, pause, overtones) = pick(random, list(ALARMS.items()))
    speed, length = random.uniform(0.8, 1.2), int(on * SAMPLE_RATE)
    tone = sing(np.full(length, log_uniform(random, *pitches)), overtones) * swell(length, 0.004, 0.006)
    sound, start, beeps = np.zeros(samples), random.uniform(0.01, 0.15), 0
    while start * SAMPLE_RATE < samples:
        add(sound, tone, int(start * SAMPLE_RATE))
        beeps += 1
        start += (on + (off if beeps % group else pause)) * speed
    return name, sound


def _laser(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, interval = pick_value(random, {
        "a laser gun fires single shots": (0.5, 0.75),
        "a laser gun fires": (0.28, 0.42),
        "a laser gun fires rapidly": (0.12, 0.2),
    })
    high, low, wobble = log_uniform(random, 2500, 6000), log_uniform(random, 120, 500), random.uniform(0, 0.15)
    length = int(SAMPLE_RATE * random.uniform(0.18, 0.45))
    time = np.arange(length) / SAMPLE_RATE
    sweep = low + (high - low) * np.exp(-time * random.uniform(12, 30))
    sweep *= 1 + wobble * np.sin(2 * np.pi * random.uniform(30, 90) * time)
    zap = sing(sweep, (1, 0.5, 0.3, 0.15)) * swell(length, 0.002, 0.05) * fade_away(length, 1.2 * length / SAMPLE_RATE)
    sound = np.zeros(samples)
    for start in beat(random, samples, interval, jitter=0.03):
        add(sound, zap * random.uniform(0.8, 1), start)
    return name, sound


# --- animals ---

SONGS = {  # seconds of a note, seconds between notes, notes in a phrase, glide of a note in octaves
    "a bird chirps": ((0.05, 0.09), (0.06, 0.14), (3, 7), (-0.9, -0.3)),
    "a bird trills": ((0.02, 0.035), (0.012, 0.025), (10, 22), (-0.4, 0.4)),
    "a bird whistles": ((0.15, 0.35), (0.03, 0.1), (2, 4), (-0.35, 0.35)),
}


def _birds(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, (lengths, gaps, counts, glides) = pick(random, list(SONGS.items()))
    flock = pick(random, (1, 1, 3))
    sound = np.zeros(samples)
    for _ in range(flock):
        pitch = log_uniform(random, 2000, 3800)
        length, gap, start = random.uniform(*lengths), random.uniform(*gaps), random.uniform(0.01, 0.3)
        span = np.linspace(0, 1, int(length * SAMPLE_RATE))
        bend = random.uniform(*glides) * (span - 0.5) + random.uniform(0, 0.3) * np.sin(np.pi * span)
        envelope = log_uniform(random, 0.3, 1) * swell(len(span), 0.3 * length, 0.5 * length)
        while start * SAMPLE_RATE < samples:
            for _ in range(int(random.uniform(*counts))):
                note = sing(pitch * random.uniform(0.96, 1.04) * 2 ** (bend * random.uniform(0.9, 1.1)), (1, 0.08))
                add(sound, note * envelope, int(start * SAMPLE_RATE))
                start += length + gap
            start += random.uniform(0.15, 0.5)
    return (name if flock == 1 else name.replace("a bird", "some birds").removesuffix("s")), sound


# --- surroundings ---


def reverberate(random: Random, sound: np.ndarray, decay: float, *, wet: float) -> np.ndarray:
    """The sound in a room whose echoes take `decay` seconds to fall by 60 dB, `wet` of the energy theirs."""
    length = int(decay * SAMPLE_RATE)
    echoes = shape(noise(random, length) * fade_away(length, decay), partial(low_pass, cutoff=5000, order=1))
    echoes *= np.sqrt(wet / np.sum(echoes**2))
    echoes[0] += np.sqrt(1 - wet)
    return convolve(sound, echoes)


# Where a sound is heard decides how far off or in which room it may be.
INDOORS: dict[str, Recipe] = {
    "wood": partial(_impact, material=MATERIALS["wood"]),
    "metal": partial(_impact, material=MATERIALS["metal"]),
    "glass": _glass,
    "door": _door,
    "whoosh": _whoosh,
    "laser": _laser,
}
OUTDOORS: dict[str, Recipe] = {
    "stone": partial(_impact, material=MATERIALS["stone"]),
    "bell": _bell,
    "footsteps": _footsteps,
    "fire": _fire,
    "wind": _wind,
    "rain": _rain,
    "thunder": _thunder,
    "explosion": _explosion,
    "drips": _drips,
    "stream": _stream,
    "engine": _engine,
    "siren": _siren,
    "alarm": _alarm,
    "birds": _birds,
}
