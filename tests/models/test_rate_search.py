"""The search for codes that weighs error against the bits of the prior."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from models.prior import Prior
from models.quantizers.fsq import FSQ
from models.quantizers.qinco2 import QINCo2
from models.quantizers.quantizer import Quantizer
from models.quantizers.residual import ResidualQuantizer
from models.rate_search import RateSearch

WIDTH, BOOKS, SIZE = 6, 3, 8


def sequences(rows: int, frames: int, *, seed: int) -> Tensor:
    """Vectors that change slowly, so that the previous codes say something of the next ones."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(rows, frames, WIDTH, generator=generator) * torch.linspace(2, 0.2, WIDTH)
    z = torch.zeros_like(steps)
    for frame in range(frames):
        z[:, frame] = 0.8 * z[:, frame - 1] + steps[:, frame] if frame else steps[:, frame]
    return 3 + 2 * z


def make(kind: str) -> Quantizer:
    torch.manual_seed(0)
    if kind == "residual":
        quantizer: Quantizer = ResidualQuantizer(WIDTH, BOOKS, SIZE, beam=SIZE**BOOKS)
    else:
        quantizer = QINCo2(WIDTH, BOOKS, SIZE, beam=SIZE**BOOKS, candidates=SIZE**BOOKS, depth=1, embedding=8, hidden=8)
    quantizer.fit(sequences(40, 50, seed=1).flatten(0, 1), seed=0)
    if isinstance(quantizer, QINCo2):
        for step in quantizer.steps:  # the networks start at zero
            torch.nn.init.normal_(step.outward.weight, std=0.05)
    return quantizer


@pytest.fixture(scope="module", params=["residual", "qinco2"])
def quantizer(request) -> Quantizer:
    return make(request.param)


@pytest.fixture(scope="module")
def prior(quantizer) -> Prior:
    """A prior that has learned from codes of least error."""
    torch.manual_seed(1)
    prior = Prior(BOOKS, SIZE)
    codes = quantizer.encode(sequences(40, 50, seed=1))
    prior.fit(codes.flatten(0, 1))
    optimizer = torch.optim.AdamW(prior.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        prior(codes).mean().backward()
        optimizer.step()
    return prior.eval()


def errors(quantizer: Quantizer, codes: Tensor, z: Tensor) -> Tensor:
    """Squared errors (R, N), in thousandths of the variance of z."""
    difference = quantizer.standardise(quantizer.decode(codes)) - quantizer.standardise(z)
    return 1000 * difference.square().mean(-1)


@torch.no_grad()
def test_a_wide_enough_beam_finds_the_least_error_plus_weighted_bits_of_all(quantizer, prior):
    z, weight = sequences(3, 6, seed=2), 20.0
    codes = RateSearch(quantizer, prior, error_per_bit=weight).encode(z)
    every = torch.tensor(list(product(range(SIZE), repeat=BOOKS)))
    for row, frame in product(range(3), range(6)):
        candidates = torch.cat([codes[row, :frame].expand(len(every), -1, -1), every[:, None]], dim=1)
        error = errors(quantizer, every, z[row, frame].expand(len(every), -1))
        score = error + weight * prior(candidates)[:, -1].sum(-1)
        found = int((every == codes[row, frame]).all(-1).nonzero())
        assert score[found] <= score.min() * (1 + 1e-4)


@torch.no_grad()
def test_more_error_per_bit_gives_fewer_bits_and_more_error(quantizer, prior):
    z = sequences(10, 40, seed=3)
    found = [RateSearch(quantizer, prior, error_per_bit=weight).encode(z) for weight in (0.0, 10.0, 30.0, 100.0)]
    bits = [prior.coder().bits(codes.numpy()) for codes in found]
    error = [errors(quantizer, codes, z).mean().item() for codes in found]
    assert all(later < 0.97 * earlier for earlier, later in pairwise(bits))
    assert all(later > 1.01 * earlier for earlier, later in pairwise(error))


@torch.no_grad()
def test_it_is_better_than_a_mix_of_all_and_of_fewer_codebooks(quantizer, prior):
    z, coder = sequences(10, 40, seed=3), prior.coder()
    two, three, weighed = (
        quantizer.encode(z, books=2),
        quantizer.encode(z),
        RateSearch(quantizer, prior, error_per_bit=40.0).encode(z),
    )
    few, many, bits = (coder.bits(codes.numpy()) for codes in (two, three, weighed))
    share = (bits - few) / (many - few)
    assert 0.2 < share < 0.8
    mixed = (1 - share) * errors(quantizer, two, z).mean() + share * errors(quantizer, three, z).mean()
    assert errors(quantizer, weighed, z).mean() < 0.9 * mixed


@torch.no_grad()
def test_at_no_weight_it_finds_the_codes_of_encode(quantizer, prior):
    z = sequences(4, 30, seed=4)
    found = RateSearch(quantizer, prior, error_per_bit=0.0).encode(z)
    assert (found == quantizer.encode(z)).float().mean() > 0.99  # rounding may tip a tie
    two = RateSearch(quantizer, prior, error_per_bit=0.0, books=2).encode(z)
    assert (two == quantizer.encode(z, books=2)).float().mean() > 0.99


def test_a_row_goes_on_where_it_was_and_rows_do_not_mix(quantizer, prior):
    z = sequences(3, 30, seed=5)
    whole = RateSearch(quantizer, prior, error_per_bit=10.0).encode(z)
    for row in range(3):
        search = RateSearch(quantizer, prior, error_per_bit=10.0)
        parts = [search.encode(part) for part in z[row : row + 1].split([7, 1, 22], dim=1)]
        assert (torch.cat(parts, dim=1) == whole[row]).float().mean() > 0.99


def test_what_cannot_be_weighed_is_refused(quantizer, prior):
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="at least 0"):
            RateSearch(quantizer, prior, error_per_bit=weight)
    with pytest.raises(ValueError, match=r"fsq can.t weigh error"):
        RateSearch(FSQ(WIDTH, BOOKS, SIZE), prior, error_per_bit=1.0)
    with pytest.raises(ValueError, match="has 3 books"):
        RateSearch(quantizer, prior, error_per_bit=1.0, books=4)
