"""Recipes of tonal sounds: engines, sirens, alarms, lasers and birds."""

from __future__ import annotations

import numpy as np

from trainer.data.synth.tools import (
    SAMPLE_RATE,
    Random,
    Recipe,
    add,
    beat,
    bump,
    fade_away,
    log_uniform,
    low_pass,
    noise,
    pick,
    pick_value,
    shape,
    sing,
    swell,
    wander,
)

ENGINES = {  # strokes per second, range of their random variation, factor by which they grow until the end
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
    roar = fire + random.uniform(0.3, 1) * breath
    roar = shape(roar, lambda f: 0.3 * low_pass(f, 900, 1.2) + bump(f[:, None], body, 0.25) @ loud)
    return name, roar * (speed / speed.max()) ** 0.5


SIRENS = {  # swings per second, lowest pitch in Hz, height of a swing in octaves, abruptness
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


ALARMS = {  # pitch in Hz, seconds per beep, seconds between beeps, beeps per group, seconds between groups, overtones
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
    name, interval = pick_value(
        random,
        {
            "a laser gun fires single shots": (0.5, 0.75),
            "a laser gun fires": (0.28, 0.42),
            "a laser gun fires rapidly": (0.12, 0.2),
        },
    )
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


SONGS = {  # seconds per note, seconds between notes, notes per phrase, glide of a note in octaves
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


INDOORS: dict[str, Recipe] = {"laser": _laser}
OUTDOORS: dict[str, Recipe] = {"engine": _engine, "siren": _siren, "alarm": _alarm, "birds": _birds}
