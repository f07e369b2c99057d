"""The prior: what it learns, and that its integers are the same everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models import prior as module
from models.prior import Coder, Prior


def make_prior(books: int = 3, size: int = 16, *, seed: int = 0) -> Prior:
    """One whose every weight says something."""
    torch.manual_seed(seed)
    prior = Prior(books, size)
    with torch.no_grad():
        for value in (prior.start, prior.mix_bias, prior.out, prior.bias):
            value.normal_()
    return prior


def random_codes(rows: int, frames: int, books: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(1).integers(0, size, (rows, frames, books))


def chain(clips: int, frames: int, *, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Codes (clips, frames, 2): the first book mostly follows itself by one, the second is the first's or beside it."""
    random = np.random.default_rng(seed)
    first = (random.integers(0, size, (clips, 1)) + np.cumsum(random.random((clips, frames)) < 0.9, axis=1)) % size
    return torch.from_numpy(np.stack([first, (first * 5 + random.integers(0, 2, first.shape)) % size], axis=2))


def test_it_begins_as_how_often_codes_occur():
    codes = torch.from_numpy(np.random.default_rng(0).binomial(15, 0.3, (4000, 3)))
    prior = Prior(3, 16)
    prior.fit(codes)
    shares = torch.stack([torch.bincount(book, minlength=16) for book in codes.T]) / len(codes)
    entropy = -(shares * shares.clamp_min(1e-9).log2()).sum(1)
    torch.testing.assert_close(prior(codes[None]).mean(dim=(0, 1)), entropy, atol=0.01, rtol=0)


def test_it_learns_from_the_vector_before_and_from_the_earlier_books():
    prior = Prior(2, 16)
    prior.fit(chain(64, 50).flatten(0, 1))
    before = prior(chain(16, 50, seed=1)).mean(dim=(0, 1))
    optimizer = torch.optim.AdamW(prior.parameters(), lr=2e-2)
    for step in range(120):
        optimizer.zero_grad()
        prior(chain(8, 50, seed=step + 2)).mean().backward()
        optimizer.step()
    test = chain(16, 50, seed=1)
    after = prior(test)[:, 1:].mean(dim=(0, 1))
    assert before.min() > 3.9
    least = torch.tensor([-0.9 * math.log2(0.9) - 0.1 * math.log2(0.1), 1.0])
    assert (after - least).max() < 0.1
    coder = prior.coder()
    assert len(coder.encode(test.numpy())) * 8 == pytest.approx(float(prior(test).detach().sum()), rel=0.01)


def test_what_is_held_at_once_makes_no_difference(monkeypatch):
    """Neither to the bits of a training step nor to its gradient."""
    prior, codes = make_prior(), torch.from_numpy(random_codes(2, 5, 3))
    outcomes = []
    for limit in (2**26, 0):
        monkeypatch.setattr(module, "_LOGITS", limit)
        prior.zero_grad()
        bits = prior(codes)
        bits.sum().backward()
        outcomes.append([bits.detach(), *(value.grad.clone() for value in prior.parameters())])
    torch.testing.assert_close(*outcomes)
    assert all(gradient.abs().max() > 0 for gradient in outcomes[0])


def test_a_prefix_of_the_books_costs_as_much_alone():
    prior, codes = make_prior(), torch.from_numpy(random_codes(1, 1, 3))
    torch.testing.assert_close(prior(codes[..., :2]), prior(codes)[..., :2])


def test_integers_give_nearly_what_training_saw():
    prior, codes = make_prior(4, 64), random_codes(2, 40, 4, 64)
    assert prior.coder().bits(codes) == pytest.approx(float(prior(torch.from_numpy(codes)).detach().sum()), rel=2e-3)


@pytest.mark.parametrize(("books", "size"), [(1, 2), (3, 16), (15, 256), (2, 4096)])
@pytest.mark.parametrize("frames", [0, 1, 2, 9])
@pytest.mark.parametrize("interleaved", [False, True])
def test_codes_come_back(books, size, frames, interleaved):
    coder, codes = make_prior(books, size).coder(), random_codes(2, frames, books, size)
    data = coder.encode(codes, interleaved=interleaved)
    assert np.array_equal(coder.decode(data, 2, frames, books, interleaved=interleaved), codes)
    assert len(data) * 8 < coder.bits(codes) + 9
    assert not data.endswith(b"\0")


@pytest.mark.parametrize("interleaved", [False, True])
def test_portions_make_no_difference(monkeypatch, interleaved):
    coder, codes = make_prior().coder(), random_codes(2, 50, 3)
    whole = coder.encode(codes, interleaved=interleaved)
    monkeypatch.setattr(module, "_TABLE_NUMBERS", 16 * 3 * 7)
    assert coder.encode(codes, interleaved=interleaved) == whole


def test_interleaved_rows_know_their_own_vectors_before():
    """Rows that are interleaved cost what they cost one after the other, to a few bytes."""
    coder, codes = make_prior().coder(), random_codes(2, 50, 3)
    assert abs(len(coder.encode(codes, interleaved=True)) - len(coder.encode(codes))) <= 1


def test_a_prefix_of_the_books_is_coded_alike():
    coder, codes = make_prior().coder(), random_codes(1, 30, 2)
    assert np.array_equal(coder.decode(coder.encode(codes), 1, 30, 2), codes)


def python_table(coder: Coder, book: int, known: list[int]) -> list[int]:
    """The frequencies in whole numbers of Python: no rounding, no order of summation, no library."""

    def whole(array):
        return [[int(number) for number in row] for row in array]

    def times(matrix, vector):
        return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]

    bias = [int(number) for number in coder.mix_bias[book]]
    mixed = [a + b for a, b in zip(times(whole(coder.mix[book]), known), bias, strict=True)]
    hidden = [min(max((number + 512) // 1024, -1024), 1024) for number in mixed]
    logits = [a + int(b) for a, b in zip(times(whole(coder.out[book]), hidden), coder.bias[book], strict=True)]
    below = [(max(logits) - logit) >> 12 for logit in logits]
    powers = module._powers().tolist()
    weights = [powers[number % 256] >> min(number // 256, 31) for number in below]
    total = 2**24 - len(weights)
    share = (total << 30) // sum(weights)
    frequencies = [weight * share >> 30 for weight in weights]
    frequencies[logits.index(max(logits))] += total - sum(frequencies)
    return frequencies


def test_frequencies_are_those_of_exact_arithmetic():
    coder = make_prior(3, 64).coder()
    random = np.random.default_rng(0)
    for book in range(3):
        known = random.integers(-(2**14), 2**14, 32).astype(float)
        table = coder._table(book, known[None])[0]
        assert table.tolist() == python_table(coder, book, [int(number) for number in known])
        assert table.min() >= 0
        assert table.sum() == 2**24 - 64


def test_frequencies_of_many_are_those_of_whole_numbers():
    """numpy's int64, of as many sums as rounding would need to show."""
    prior = make_prior(1, 256)
    prior.out.data *= 3
    coder = prior.coder()
    known = np.random.default_rng(0).integers(-(2**11), 2**11, (1000, 32))
    mix, bias, out, logit = (getattr(coder, name)[0].astype(np.int64) for name in ("mix", "mix_bias", "out", "bias"))
    hidden = ((known @ mix.T + bias + 512) >> 10).clip(-1024, 1024)
    assert np.abs(hidden).mean() < 900
    assert np.array_equal(coder._table(0, known.astype(float)), module._frequencies(hidden @ out.T + logit))


def test_frequencies_depend_on_no_order_of_summation_and_no_number_of_rows():
    """Features put in another order are summed in another order, and more rows take other paths through BLAS."""
    prior, random = make_prior(3, 256), np.random.default_rng(0)
    wide, narrow = random.permutation(16), random.permutation(16)
    turned = Prior(3, 256)
    with torch.no_grad():
        for name in ("same", "before", "start"):
            getattr(turned, name).copy_(getattr(prior, name)[..., wide])
        turned.mix.copy_(prior.mix[:, narrow][..., np.concatenate([wide, 16 + wide])])
        turned.mix_bias.copy_(prior.mix_bias[:, narrow])
        turned.out.copy_(prior.out[..., narrow])
        turned.bias.copy_(prior.bias)
    codes = random_codes(1, 60, 3, 256)
    ours, theirs = prior.coder(), turned.coder()
    assert ours.hash != theirs.hash
    assert ours.encode(codes) == theirs.encode(codes)
    known = random.integers(-(2**14), 2**14, (77, 32)).astype(float)
    together = ours._table(1, known)
    assert np.array_equal(together, np.concatenate([ours._table(1, row[None]) for row in known]))
    assert np.array_equal(together, ours._table(1, np.asfortranarray(known)))


def test_floating_point_would_not_do():
    """What the integers are for: in float32 the order of a sum changes its last digits, and with them frequencies."""
    random = np.random.default_rng(0)
    numbers = random.normal(size=(200, 64)).astype(np.float32)
    assert (numbers.cumsum(1)[:, -1] != numbers[:, ::-1].cumsum(1)[:, -1]).any()


def test_powers_of_two_are_rounded_down_exactly():
    powers = module._powers()
    assert powers[0] == 2**30
    for step, power in enumerate(powers.tolist()):
        assert power**256 <= 2 ** (30 * 256 - step) < (power + 1) ** 256


def test_extreme_weights_stay_exact():
    prior = make_prior()
    with torch.no_grad():
        for value in prior.parameters():
            value.copy_(torch.sign(value) * 1e6)
    coder, codes = prior.coder(), random_codes(1, 20, 3)
    data = coder.encode(codes)
    assert np.array_equal(coder.decode(data, 1, 20, 3), codes)
    assert len(data) * 8 <= 20 * 3 * 24 + 8


@pytest.mark.parametrize("data", [b"\0", b"\xff" * 400, bytes(400)])
def test_bytes_that_stand_for_no_codes_are_refused(data):
    coder, codes = make_prior().coder(), random_codes(1, 200, 3)
    assert data != coder.encode(codes)
    with pytest.raises(ValueError, match="damaged"):
        coder.decode(data, 1, 200, 3)


def test_other_books_and_sizes_are_refused():
    coder = make_prior().coder()
    with pytest.raises(ValueError, match="3 books, not 4"):
        coder.encode(random_codes(1, 2, 4))
    with pytest.raises(ValueError, match="books of 16"):
        coder.encode(np.full((1, 2, 3), 16))
    for books, size in ((0, 16), (1, 1), (1, 2**17)):
        with pytest.raises(ValueError, match="a prior is over"):
            Prior(books, size)


def test_the_largest_is_still_small():
    """K = 4096 and M = 30: 64 MiB would be too much beside a D of hundreds."""
    assert sum(value.numel() for value in Prior(30, 4096).parameters()) * 4 < 32 * 2**20
