"""Intervals in samples and in steps: a pure function of the samples seen."""

from __future__ import annotations

import pytest

from trainer.recipes.reading import load_recipe
from trainer.schedule import is_due, lengthened_intervals
from trainer.stages import STAGES


def due_after(every: int, batch: int, least_steps: int, steps: int = 1000) -> list[int]:
    """Return the steps after which something is due."""
    return [
        step for step in range(1, steps + 1) if is_due((step - 1) * batch, step * batch, every, least_steps=least_steps)
    ]


def test_an_interval_has_at_least_so_many_steps():
    assert due_after(20_000, 2048, 100) == list(range(100, 1001, 100))
    assert due_after(20_000, 2048, 1)[:3] == [10, 20, 30]


def test_a_long_interval_is_that_in_samples():
    assert due_after(20_000, 32, 100, 2000) == [625, 1250, 1875]
    assert due_after(100, 8, 1, 40) == [13, 25, 38]


def test_nothing_is_due_without_an_interval():
    assert due_after(0, 8, 5) == []


@pytest.mark.parametrize(
    "recipe",
    ["tiny", "demo", "spresso_11hz", "spresso_1hz", "spresso_25hz", "stable_audio_open", "stable_audio_3_11hz"],
)
def test_the_bounds_change_no_recipe_but_one_stage_of_large_batches(recipe):
    config = load_recipe(recipe, ["autoencoder={kind: magnitude, folder: null}"], released=False)
    log, checkpoint = config.log, config.checkpoint
    changed = [
        stage
        for stage in config.stages
        if STAGES[stage].trained
        for every, least in ((log.every, log.least_steps), (checkpoint.every, checkpoint.least_steps))
        if every < least * config.stage(stage).global_batch
    ]
    assert set(changed) == ({"quantize"} if recipe == "spresso_1hz" else set())


def test_intervals_that_are_lengthened_are_named():
    settings = ["log.every=64", "log.least_steps=10", "log.samples_every=0", "checkpoint.every=64"]
    config = load_recipe("tiny", [*settings, "checkpoint.least_steps=100"], released=False)
    assert lengthened_intervals(config, 8) == {"log.every": 80, "checkpoint.every": 800}
    assert lengthened_intervals(config, 1) == {"checkpoint.every": 100}
