from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer import randomness

# Random123 1.14, tests/kat_vectors: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def keys(count: int, *, seed: int = 1, purpose: str = "noise", start: int = 0) -> torch.Tensor:
    return randomness.keys(seed, purpose, torch.arange(start, start + count))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected):
    result = randomness.philox4x32([torch.tensor([word]) for word in words(counter)], *words(key))
    assert [int(word) for word in result] == words(expected)


def test_philox_agrees_with_plain_integers_on_random_input():
    def plain(counter, key):
        c, k = list(counter), list(key)
        for _ in range(10):
            high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
            high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
            c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        return c

    inputs = np.random.default_rng(0).integers(0, 2**32, (6, 200))
    counter, (key0, key1) = [torch.tensor(row) for row in inputs[:4]], torch.tensor(inputs[4:])
    result = torch.stack(randomness.philox4x32(counter, key0, key1), dim=1)
    assert result.tolist() == [plain([int(x) for x in row[:4]], [int(x) for x in row[4:]]) for row in inputs.T]


def test_known_numbers_never_change():
    """A run's noise must not change from one version to the next."""
    assert keys(2).tolist() == [119055702548397017, -3705676399658241673]
    assert randomness.integers(keys(4), 1000).tolist() == [346, 613, 489, 137]
    assert randomness.uniform(keys(1), 3).tolist() == [[0.7999127507209778, 0.34634631872177124, 0.5262228846549988]]
    assert randomness.normal(keys(1), 3).tolist() == [[0.10959912836551666, 0.6591611504554749, 1.3814325332641602]]


def test_a_row_depends_on_its_key_alone():
    all_keys = keys(13)
    high = torch.arange(1, 14) * 1000
    order = torch.tensor([7, 0, 12, 3])
    for draw in (randomness.uniform, randomness.normal):
        whole = draw(all_keys, 5, 7)
        assert torch.equal(draw(all_keys[4:9], 5, 7), whole[4:9])
        assert torch.equal(draw(all_keys[order], 5, 7), whole[order])
        assert torch.equal(torch.cat([draw(key[None], 5, 7) for key in all_keys]), whole)
    assert torch.equal(randomness.integers(all_keys[order], high[order]), randomness.integers(all_keys, high)[order])


def test_numbers_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = randomness.normal(keys(8), 64, 101)
        torch.set_num_threads(3)
        assert torch.equal(randomness.normal(keys(8), 64, 101), one)
    finally:
        torch.set_num_threads(threads)


def test_shapes_and_types():
    assert randomness.uniform(keys(3)).shape == (3,)
    assert randomness.normal(keys(3), 2, 5).shape == (3, 2, 5)
    assert randomness.normal(keys(3), 2, 5).is_contiguous()
    assert randomness.normal(keys(0), 4).shape == (0, 4)
    assert randomness.normal(keys(3), 0).shape == (3, 0)
    assert randomness.normal(keys(3), 1).dtype == randomness.uniform(keys(3)).dtype == torch.float32
    assert randomness.integers(keys(3), 10).dtype == keys(3).dtype == torch.int64


def test_keys_differ_by_seed_purpose_and_counter():
    counters = torch.tensor([0, 1, 2**31, 2**32, 2**32 + 1, 2**62, -1])
    groups = [(0, "noise"), (1, "noise"), (-1, "noise"), (2**70, "noise"), (0, "crop"), (1, "1:noise"), (11, "noise")]
    distinct = {int(key) for seed, purpose in groups for key in randomness.keys(seed, purpose, counters)}
    assert len(distinct) == len(groups) * len(counters)
    assert keys(300_000).unique().numel() == 300_000


def test_drawing_leaves_its_arguments_alone():
    counters = torch.arange(5)
    drawn = randomness.keys(1, "noise", counters)
    before = drawn.clone()
    for draw in (randomness.uniform, randomness.normal):
        draw(drawn, 6)
    randomness.integers(drawn, 10)
    assert torch.equal(counters, torch.arange(5))
    assert torch.equal(drawn, before)


def test_uniform_is_uniform_and_never_reaches_its_ends():
    sample = randomness.uniform(keys(1000), 1000)
    assert 0.0 < sample.min() < 1e-5
    assert 1 - 1e-5 < sample.max() < 1.0
    counts = torch.histc(sample, bins=100, min=0, max=1)
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom


def test_uniform_is_inside_its_ends_for_extreme_words(monkeypatch):
    extremes = torch.tensor([[0], [0xFFFFFFFF], [0], [0xFFFFFFFF]])
    monkeypatch.setattr(randomness, "_words", lambda keys, shape: tuple(extremes.clone() for _ in range(4)))
    sample = randomness.uniform(keys(4), 4)
    assert sample.min() > 0
    assert sample.max() < 1
    assert randomness.normal(keys(4), 4).isfinite().all()


def test_normal_is_normal():
    sample = randomness.normal(keys(1000), 1001).double()
    count = sample.numel()
    assert abs(sample.mean()) < 4 / math.sqrt(count)
    assert abs(sample.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((sample**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((sample**4).mean() - 3) < 4 * math.sqrt(96 / count)
    distance = torch.special.ndtr(sample.flatten().sort().values) - torch.linspace(0, 1, count)
    assert distance.abs().max() < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov at 0.1 %
    assert 4.5 < sample.abs().max() < 6.8


def test_box_muller_agrees_with_double_precision():
    generator = torch.Generator().manual_seed(0)
    radius_word, angle_word = torch.randint(0, 2**32, (2, 100_000), generator=generator)
    radius_word[:4] = torch.tensor([0, 1, 0xFFFFFFFF, 0xFFFFFF00])
    angle_word[4:8] = torch.tensor([0, 2**30, 2**31, 0xFFFFFFFF])
    radius = np.sqrt(-2 * np.log((radius_word.float().numpy() + np.float32(0.5)).astype(np.float64) * 2.0**-32))
    angle = (angle_word.numpy() - 2.0**31) * 2 * np.pi * 2.0**-32
    first, second = randomness._box_muller(radius_word.clone(), angle_word.clone())
    assert np.abs(first.numpy() - radius * np.sin(angle)).max() < 3e-6
    assert np.abs(second.numpy() - radius * np.cos(angle)).max() < 3e-6


def test_places_counters_purposes_and_seeds_are_uncorrelated():
    count = 1_000_000
    base = randomness.normal(keys(1000), 1000)
    others = {
        "next counter": randomness.normal(keys(1000, start=1), 1000),
        "another purpose": randomness.normal(keys(1000, purpose="noises"), 1000),
        "another seed": randomness.normal(keys(1000, seed=2), 1000),
        "next place": base.roll(1, dims=1),
        "the place of the same block": base.roll(250, dims=1),
    }
    for name, other in others.items():
        for a, b in ((base, other), (base.abs() - base.abs().mean(), other.abs() - other.abs().mean())):
            assert abs((a * b).mean()) < 5 / math.sqrt(count), name


def test_integers_cover_their_range_evenly():
    counts = torch.bincount(randomness.integers(keys(70_000), 7), minlength=7)
    assert len(counts) == 7
    assert (counts - 10_000).abs().max() < 500
    high = torch.tensor([1, 2, 3, 2**31 - 1]).repeat(5000)
    sample = randomness.integers(keys(20_000), high)
    assert (sample >= 0).all()
    assert (sample < high).all()
    large = sample[high == 2**31 - 1].double() / 2**31
    assert abs(large.mean() - 0.5) < 0.02
    assert large.max() > 0.99


@pytest.mark.parametrize("high", [0, -1, 2**31, torch.tensor([5, 0])])
def test_integers_refuse_a_range_they_cannot_draw_from(high):
    with pytest.raises(ValueError, match="high"):
        randomness.integers(keys(2), high)


def test_the_square_root_is_rounded_exactly():
    """With MKL, torch's own is not."""
    x = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) * 60
    assert torch.equal(randomness._sqrt(x.clone()), torch.from_numpy(np.sqrt(x.numpy())))
