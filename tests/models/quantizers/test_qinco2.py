from __future__ import annotations

import copy
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from models.quantizers.qinco2 import QINCo2
from models.quantizers.quantizer import make_quantizer
from models.quantizers.residual import ResidualQuantizer

WIDTH, BOOKS, SIZE = 8, 4, 16


def make_vectors(count: int, *, seed: int = 0) -> Tensor:
    """Vectors near a curved surface: what the first book says decides in which directions the rest lie."""
    generator = torch.Generator().manual_seed(seed)
    angle = 6.28 * torch.rand(count, 1, generator=generator)
    radius = 1 + 0.3 * torch.randn(count, 1, generator=generator)
    waves = torch.cat([(n * angle).cos() for n in (1, 2, 3, 4)] + [(n * angle).sin() for n in (1, 2, 3, 4)], dim=1)
    return 3 + radius * waves


def error(quantizer: QINCo2 | ResidualQuantizer, z: Tensor, **options: int) -> float:
    z_q = quantizer.decode(quantizer.encode(z, **options)).detach()
    return float((z_q - z).square().mean() / (z - z.mean(0)).square().mean())


def make(**options: int) -> QINCo2:
    sizes = {"beam": 4, "candidates": 8, "depth": 1, "embedding": 24, "hidden": 48}
    return QINCo2(WIDTH, BOOKS, SIZE, **(sizes | options))


@pytest.fixture(scope="module")
def fitted() -> QINCo2:
    torch.manual_seed(0)
    quantizer = make()
    quantizer.fit(make_vectors(2000), seed=1)
    return quantizer


@pytest.fixture(scope="module")
def learned(fitted) -> QINCo2:
    quantizer = copy.deepcopy(fitted)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=3e-3, weight_decay=0.0)
    vectors = make_vectors(2000)
    for step in range(150):
        rows = torch.randint(len(vectors), (256,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        quantizer.loss(vectors[rows]).mean().backward()
        optimizer.step()
    return quantizer


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return make_vectors(400, seed=5)


def test_it_starts_as_the_residual_quantizer_that_its_codebooks_were_fitted_as(fitted, held_out):
    residual = ResidualQuantizer(WIDTH, BOOKS, SIZE, beam=4)
    residual.fit(make_vectors(2000), seed=1)
    assert (fitted.encode(held_out) == residual.encode(held_out)).float().mean() > 0.99  # rounding may tip a tie
    codes = residual.encode(held_out)
    torch.testing.assert_close(fitted.decode(codes), residual.decode(codes))


def test_it_learns_what_plain_codebooks_cannot_say(fitted, learned, held_out):
    residual = ResidualQuantizer(WIDTH, BOOKS, SIZE, beam=32)
    residual.fit(make_vectors(2000), seed=1, fit_beam=32)
    assert error(learned, held_out) < 0.8 * error(residual, held_out)
    assert error(learned, held_out) < 0.8 * error(fitted, held_out)


def test_every_prefix_of_the_codes_decodes_and_more_of_them_are_nearer(learned, held_out):
    codes = learned.encode(held_out)
    errors = [(learned.decode(codes[:, :m]) - held_out).square().mean().item() for m in range(1, BOOKS + 1)]
    assert all(later < 0.9 * earlier for earlier, later in pairwise(errors))
    variance = (held_out - held_out.mean(0)).square().mean().item()
    own = [error(learned, held_out, books=m) for m in range(1, BOOKS + 1)]
    assert all(o <= e / variance + 1e-6 for o, e in zip(own, errors, strict=True))


def test_a_later_codeword_depends_on_the_codes_before_it(learned):
    def second(first: int) -> Tensor:
        one, both = (learned.decode(torch.tensor([first, 3][:m])) for m in (1, 2))
        return both - one

    assert (second(0) - second(1)).abs().max() > 1e-2


def test_a_search_wide_enough_finds_the_best_codes_of_all(learned, held_out):
    quantizer = make_quantizer(learned.config() | {"books": 3, "beam": SIZE**2, "candidates": SIZE**3})
    state = learned.state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith("steps.2.")}
    kept |= {"codebooks": state["codebooks"][:3], "preselection": state["preselection"][:2]}
    quantizer.load_state_dict(kept)
    everything = torch.tensor(list(product(range(SIZE), repeat=3)))
    nearest = torch.cdist(held_out[:20], quantizer.decode(everything)).argmin(dim=1)
    assert torch.equal(quantizer.encode(held_out[:20]), everything[nearest])


def test_a_wider_search_is_nearer(learned, held_out):
    def with_search(beam: int, candidates: int) -> float:
        quantizer = make_quantizer(learned.config() | {"beam": beam, "candidates": candidates})
        quantizer.load_state_dict(learned.state_dict())
        return error(quantizer, held_out)

    assert with_search(16, 64) < with_search(1, 4) < with_search(1, 1)


def test_the_loss_is_the_error_of_each_prefix_and_of_each_preselection(learned, held_out):
    codes, x = learned.encode(held_out), learned.standardise(held_out)
    expected = torch.zeros(len(x))
    for m in range(1, BOOKS + 1):
        expected += (learned.standardise(learned.decode(codes[:, :m])) - x).square().mean(1)
        if m > 1:
            before = learned.standardise(learned.decode(codes[:, : m - 1]))
            selected = before + learned.preselection[m - 2][codes[:, m - 1]]
            expected += (selected - x).square().mean(1)
    torch.testing.assert_close(learned.loss(held_out), expected, rtol=1e-4, atol=1e-6)


def test_all_weights_learn(fitted, held_out):
    quantizer = copy.deepcopy(fitted)
    for _ in range(2):  # the last layers start at zero: what is before them learns from the second step on
        quantizer.zero_grad()
        quantizer.loss(held_out).mean().backward()
        with torch.no_grad():
            for value in quantizer.parameters():
                value -= 0.1 * value.grad
    assert all(value.grad.abs().sum() > 0 for value in quantizer.parameters())


def test_the_codes_do_not_depend_on_how_the_search_is_cut(learned, held_out, monkeypatch):
    whole = learned.encode(held_out)
    monkeypatch.setattr("models.quantizers.qinco2._SEARCH_NUMBERS", 7 * 8 * (48 + 2 * 24))
    assert (learned.encode(held_out) == whole).all(dim=1).float().mean() > 0.99


def test_half_precision_around_it_does_not_change_the_codes(learned, held_out):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = learned.encode(held_out)
    assert torch.equal(codes, learned.encode(held_out))


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,)])
def test_shapes_and_types(learned, shape):
    codes = learned.encode(torch.randn(*shape, WIDTH))
    assert codes.shape == (*shape, BOOKS)
    assert codes.dtype == torch.int64
    assert learned.decode(codes).shape == (*shape, WIDTH)


def test_one_book_alone_is_a_plain_codebook(held_out):
    quantizer = QINCo2(WIDTH, 1, SIZE)
    quantizer.fit(make_vectors(2000), seed=1)
    nearest = torch.cdist(quantizer.standardise(held_out), quantizer.codebooks[0]).argmin(1)
    assert torch.equal(quantizer.encode(held_out)[:, 0], nearest)


def test_it_is_made_again_from_its_config_and_state(learned, held_out):
    again = make_quantizer(learned.config())
    again.load_state_dict(learned.state_dict())
    assert again.config() == learned.config()
    assert torch.equal(again.encode(held_out), learned.encode(held_out))


def test_mistakes_are_refused():
    for name in ("beam", "candidates", "embedding", "hidden"):
        with pytest.raises(ValueError, match="at least 1"):
            make(**{name: 0})
    with pytest.raises(ValueError, match="beam of 4 sequences needs at least 4 candidates, not 3"):
        make(candidates=3)
