"""Recipes of impacts, footsteps, fire, wind, water and the like, made of modes, bubbles and time-varying noise.

A recipe takes a random generator and a number of samples, and returns a caption and that many samples, at any level.
The caption fits the sound because a recipe first draws a word and then a value from the word's range.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from trainer.data.synth.tools import (
    SAMPLE_RATE,
    Random,
    Range,
    Recipe,
    add,
    beat,
    bubble,
    bump,
    claps,
    convolve,
    fade_away,
    grain,
    log_uniform,
    low_pass,
    moving_noise,
    noise,
    pick,
    pick_value,
    reverberate,
    ring,
    shape,
    sing,
    sparks,
    swell,
    wander,
)


class Material(NamedTuple):
    """The material of a struck body."""

    things: dict[str, Range]  # thing → range of the lowest mode in Hz
    blows: str
    modes: int
    spread: Range  # mode k is near k ** spread times the lowest mode: 1 for a string, 2 for a bar
    decay: Range  # seconds until the lowest mode reaches -60 dB
    damping: float  # how much faster high modes decay: decay ∝ ratio ** -damping
    contact: Range  # the level of the noise of the blow itself, in addition to the modes


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
        where = random.uniform(-1, 1, material.modes)  # the place of a blow decides which modes it excites
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
    # Bells are not perfectly round: each partial is a pair whose slow beating makes the tone waver.
    frequencies = np.concatenate((partials, partials + random.uniform(0.3, 3, len(partials))))
    decay = np.tile(random.uniform(*decays) * BELL_PARTIALS**-0.7, 2)
    amplitudes = np.tile(BELL_PARTIALS**-0.8, 2) * random.uniform(0.3, 1, len(frequencies))
    stroke = ring(frequencies, decay, amplitudes, samples)
    sound = np.zeros(samples)
    for start in beat(random, samples, log_uniform(random, *intervals), jitter=0.05):
        add(sound, stroke * random.uniform(0.6, 1), start)
    return caption, sound


def _glass(random: Random, samples: int) -> tuple[str, np.ndarray]:
    thing, size = pick_value(
        random,
        {
            "glass jar": (1.3, 1.8),
            "glass bottle": (0.8, 1.2),
            "window pane": (0.4, 0.7),
        },
    )
    sound = np.zeros(samples)
    starts = beat(random, samples, random.uniform(1.1, 1.6))
    for start in starts:
        crack = noise(random, SAMPLE_RATE // 5) * fade_away(SAMPLE_RATE // 5, 0.12 / size)
        add(sound, 1.5 * shape(crack, lambda f: 1 - low_pass(f, 1800 * size)), start)
        for _ in range(int(40 / size)):  # the shards fly, and ring as they land
            shard = grain(random, 1800 * size, 9000 * size, log_uniform(random, 0.03, 0.25), modes=3)
            add(sound, log_uniform(random, 0.05, 0.7) * shard, start + int(SAMPLE_RATE * 0.9 * random.random() ** 2))
    return f"a {thing} shatters" if len(starts) == 1 else f"{thing}s shatter one after another", sound


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
    size, pitch = pick_value(
        random,
        {
            "a heavy wooden door": (130, 260),
            "an old wooden chest": (280, 480),
            "a cupboard door": (500, 900),
        },
    )
    manner, rate = pick_value(random, {"slowly": (25, 50), "": (60, 100), "shrilly": (140, 260)})
    # The hinge sticks and slips `rate` times per second; each slip is a jerk that shakes the wood.
    jerks = wander(random, samples, random.uniform(1.5, 3), 0.4 * rate, 1.6 * rate)
    jerks *= wander(random, samples, 40, 0.85, 1.15)
    slips = np.diff(np.floor(np.cumsum(jerks) / SAMPLE_RATE), prepend=0)
    pressure = np.clip(wander(random, samples, random.uniform(2, 4), -0.3, 1), 0.06, 1)
    body = grain(random, pitch, 12 * pitch, random.uniform(0.03, 0.07), modes=12)
    sound = convolve(slips * pressure * random.uniform(0.7, 1, samples), body)
    return " ".join(f"{size} creaks {manner}".split()), sound


def _fire(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, size = pick_value(
        random,
        {
            "a small fire crackles": (0.1, 0.2),
            "a campfire crackles": (0.4, 0.7),
            "a large fire roars and crackles": (1.5, 3),
        },
    )
    roar = shape(noise(random, samples), lambda f: low_pass(f, 250, 1.5) * f / (f + 40))
    sound = 0.6 * size**0.7 * roar * wander(random, samples, 9, 0.4, 1)
    for low, high, decay, rate in ((2500, 9000, 0.004, 50), (1200, 5000, 0.007, 24), (500, 2200, 0.012, 9)):
        clicks = sparks(random, samples, rate * random.uniform(0.6, 1.6), evenness=0.4)
        sound += convolve(clicks * wander(random, samples, 3, 0.1, 1), grain(random, low, high, decay, modes=6))
    return name, sound


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
    name, pitch = pick_value(
        random,
        {
            "a sword swishes through the air": (1800, 4000),
            "a stick swings through the air": (800, 1500),
            "something heavy whooshes past": (200, 500),
        },
    )
    length = log_uniform(random, 0.8, 1.3) * (400 / pitch) ** 0.6 * 0.9
    speed = np.full(samples, 0.01)
    for start in beat(random, samples, min(0.9, length + random.uniform(0.1, 0.4)), jitter=0.2):
        add(speed, random.uniform(0.6, 1) * swell(int(length * SAMPLE_RATE), 0.6 * length, 0.4 * length), start)

    def gain(frequencies: np.ndarray, at: np.ndarray) -> np.ndarray:
        centre = pitch * (0.35 + speed[at])
        return speed[at] ** 2 * (bump(frequencies, centre, 0.35) + 0.15 * bump(frequencies, 2.5 * centre, 0.8))

    return name, moving_noise(random, samples, gain)


ROOFS = {  # pitch in Hz, and the seconds for which the surface rings after a drop
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


def _thunder(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, nearness = pick_value(
        random,
        {
            "low thunder rumbles": (0.05, 0.12),
            "thunder rolls": (0.25, 0.45),
            "a sharp clap of thunder, then a rumble": (0.9, 1.5),
        },
    )
    starts = beat(random, samples, random.uniform(0.35, 0.7), jitter=0.7)
    rumble = claps(random, samples, starts, (1.5, 4)) * wander(random, samples, 7, 0.3, 1)
    crack = claps(random, samples, starts[:1], (0.4, 1)) * nearness

    def gain(frequencies: np.ndarray, at: np.ndarray) -> np.ndarray:
        low = low_pass(frequencies, 60 + 120 * nearness + 100 * rumble[at], 2.5)
        return (rumble[at] * low + crack[at] * low_pass(frequencies, 200 + 6000 * crack[at])) * (frequencies > 30)

    return name, moving_noise(random, samples, gain)


def _explosion(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, size = pick_value(
        random,
        {
            "a firecracker bangs": (0.3, 0.5),
            "an explosion": (0.8, 1.2),
            "a huge, deep explosion": (1.8, 2.6),
        },
    )
    starts = beat(random, samples, 0.5 + 0.4 * size, jitter=0.3)
    blast = claps(random, samples, starts, (1.2 * size, 2.2 * size))
    thump = claps(random, samples, starts, (0.3 * size, 0.5 * size)) * sing(np.full(samples, 62 / size**0.6))
    debris = convolve(sparks(random, samples, 120, evenness=0.15) * blast, grain(random, 700, 5000, 0.02, modes=6))

    def gain(frequencies: np.ndarray, at: np.ndarray) -> np.ndarray:
        return blast[at] * low_pass(frequencies, 80 + 2500 * blast[at] ** 2 / size, 1.8) * (frequencies > 30)

    sound = 2 * moving_noise(random, samples, gain) + 0.5 * size * thump + 0.3 * debris
    return name + (", then more" if len(starts) > 1 else ""), np.tanh(2 * sound)


def _drips(random: Random, samples: int) -> tuple[str, np.ndarray]:
    place, echo = pick_value(random, {"a sink": (0.15, 0.3), "a bucket": (0.4, 0.6), "a cave": (1.5, 2.5)})
    pace, interval = pick_value(random, {"slowly": (0.5, 0.8), "steadily": (0.25, 0.4), "quickly": (0.1, 0.16)})
    pitch = log_uniform(random, 600, 1800)
    sound = np.zeros(samples)
    for start in beat(random, samples, interval, jitter=0.2):
        drop = bubble(pitch * log_uniform(random, 0.8, 1.25), random.uniform(0.06, 0.14), random.uniform(0.1, 0.5))
        add(sound, random.uniform(0.5, 1) * drop, start + int(random.uniform(0.005, 0.02) * SAMPLE_RATE))
        add(sound, 0.2 * grain(random, 2500, 8000, 0.006), start)  # the drop hits the surface before its bubble sounds
    return f"water drips {pace} into {place}", reverberate(random, sound, echo, wet=0.35)


def _stream(random: Random, samples: int) -> tuple[str, np.ndarray]:
    name, flow = pick_value(
        random,
        {
            "a brook trickles": (40, 70),
            "a stream babbles": (110, 180),
            "a river rushes": (220, 320),
        },
    )
    sound = np.zeros(samples)
    for _ in range(int(flow * samples / SAMPLE_RATE)):
        frequency = log_uniform(random, 350, 3500)  # small bubbles have a high pitch and decay fast
        event = bubble(frequency, 25 / frequency * random.uniform(0.7, 1.6), random.uniform(0, 0.5))
        add(sound, random.random() ** 3 * (600 / frequency) ** 0.3 * event, int(random.random() * samples))
    rush = shape(noise(random, samples), lambda f: bump(f, 1200, 1.4))
    return name, sound + 0.0012 * flow * rush * wander(random, samples, 3, 0.5, 1)


INDOORS: dict[str, Recipe] = {
    "wood": partial(_impact, material=MATERIALS["wood"]),
    "metal": partial(_impact, material=MATERIALS["metal"]),
    "glass": _glass,
    "door": _door,
    "whoosh": _whoosh,
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
}
