import numpy as np
import pytest
import torch

from trainer.checkpoints.ema import EMA
from trainer.checkpoints.profiles import WIDEST, Profile, combine, exponent


@pytest.mark.parametrize(("width", "expected"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_the_papers(width, expected):
    assert exponent(width) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("width", [0.01, 0.1, 0.2, WIDEST])
def test_a_profile_has_the_width_that_it_is_named_by(width):
    times = (np.arange(200_000) + 0.5) / 200_000
    profile = times ** exponent(width)
    mean = np.average(times, weights=profile)
    assert np.average((times - mean) ** 2, weights=profile) ** 0.5 == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("batch", [1, 5])
def test_an_average_has_its_profile_over_the_weights(batch):
    """A weight that lies between two times counts by the integral of the profile between them."""
    widths, steps = (0.05, 0.15), 40
    values = {"w": torch.full((2,), 100.0)}
    ema = EMA(values, halflife=7, profiles=widths)
    weights = torch.randn(steps, generator=torch.Generator().manual_seed(0))
    for step, weight in enumerate(weights.tolist(), start=1):
        values["w"].fill_(weight)
        ema.update(step * batch, batch)
    for width, averages in zip(widths, (ema.averages, ema.wide), strict=True):
        edges = (np.arange(steps + 1) / steps) ** (exponent(width) + 1)
        expected = float(np.diff(edges) @ weights.double().numpy())
        assert averages["w"].tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_a_stored_average_is_found_again():
    stored = [Profile(width, time) for width in (0.05, 0.1) for time in (500, 1000)]
    found = combine(stored, Profile(0.1, 1000))
    assert found.error < 1e-6
    assert found.factors == pytest.approx([0, 0, 0, 1], abs=1e-6)


def test_more_snapshots_come_nearer_and_unchanged_weights_stay():
    errors = []
    for count in (1, 2, 4, 8, 16):
        stored = [Profile(width, time) for width in (0.05, 0.1) for time in range(1000 // count, 1001, 1000 // count)]
        found = combine(stored, Profile(0.15, stored[-1].time))
        assert sum(found.factors) == pytest.approx(1)
        errors.append(found.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.2
    assert errors[3] < 0.04


def test_a_combination_is_the_average_that_was_not_kept():
    """Over a random walk, as weights of a training are, next to the average that was tracked all along."""
    steps, every, wanted = 800, 100, 0.075
    values = {"w": torch.zeros(64)}
    ema, tracked = EMA(values, halflife=0, profiles=(0.05, 0.1)), EMA(values, halflife=0, profiles=(wanted, 0.2))
    generator, kept = torch.Generator().manual_seed(0), []
    for step in range(1, steps + 1):
        values["w"] += torch.randn(64, generator=generator)
        for each in (ema, tracked):
            each.update(step, 1)
        if step % every == 0:
            kept.append((step, ema.averages["w"].clone(), ema.wide["w"].clone()))
    found = combine([Profile(width, step) for width in ema.profiles for step, *_ in kept], Profile(wanted, steps))
    together = torch.stack([each[place] for place in (1, 2) for each in kept])
    combined = torch.tensor(found.factors) @ together
    apart = (combined - tracked.averages["w"]).norm()
    assert apart < 0.05 * (ema.averages["w"] - ema.wide["w"]).norm()
