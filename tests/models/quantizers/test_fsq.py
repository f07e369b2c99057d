from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from models.quantizers.fsq import FSQ
from models.quantizers.quantizer import make_quantizer

WIDTH = 12


def make_vectors(count: int, *, seed: int = 0) -> torch.Tensor:
    spread = torch.linspace(0.5, 2, WIDTH)
    return 4 + spread * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def fitted(books: int, size: int) -> FSQ:
    quantizer = FSQ(WIDTH, books, size)
    quantizer.fit(make_vectors(4000), seed=0)
    return quantizer


def relative_error(quantizer: FSQ, z: torch.Tensor, **options: int) -> float:
    z_q = quantizer.decode(quantizer.encode(z, **options)).detach()
    return float((z_q - z).square().mean() / z.var(0).mean())


def test_bits_are_shared_out_among_a_books_dimensions():
    def levels_and_weights(books: int, size: int) -> tuple[list[int], list[int]]:
        levels, weights = FSQ(WIDTH, books, size)._levels_and_weights()
        return levels.tolist(), weights.tolist()

    assert levels_and_weights(3, 64) == ([4, 4, 2, 2], [1, 4, 16, 32])  # 6 bits for 4 dimensions
    assert levels_and_weights(12, 8) == ([8], [1])


@pytest.mark.parametrize(("books", "size"), [(3, 64), (4, 8), (12, 2), (1, 2**24)])
def test_all_codes_are_in_range_and_each_decodes_to_itself(books, size):
    quantizer = fitted(books, size)
    z = torch.cat([make_vectors(500, seed=1), torch.full((1, WIDTH), 1e9), torch.full((1, WIDTH), -1e9)])
    codes = quantizer.encode(z)
    assert codes.min() >= 0
    assert codes.max() < size
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)


def test_levels_are_filled_evenly():
    counts = torch.bincount(fitted(12, 8).encode(make_vectors(20_000, seed=2)).flatten(), minlength=8)
    assert counts.min() > 0.8 * counts.max()


def test_more_bits_and_more_books_are_nearer():
    z = make_vectors(1000, seed=3)
    errors = [relative_error(fitted(12, size), z) for size in (2, 4, 8, 16, 64)]
    assert all(later < 0.55 * earlier for earlier, later in pairwise(errors))
    quantizer = fitted(4, 64)
    prefixes = [relative_error(quantizer, z, books=books) for books in (1, 2, 3, 4)]
    assert all(later < 0.95 * earlier for earlier, later in pairwise(prefixes))


def test_what_is_left_out_decodes_to_the_mean():
    quantizer = fitted(4, 64)
    z_q = quantizer.decode(quantizer.encode(make_vectors(5), books=1))
    torch.testing.assert_close(z_q[:, 3:], quantizer.mean[3:].expand(5, -1), rtol=0, atol=1e-5)


def test_its_spread_is_learned():
    quantizer, z = fitted(12, 4), make_vectors(2000, seed=4)
    with torch.no_grad():
        quantizer.spread.mul_(2)
    before = quantizer.loss(z).mean().item()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        quantizer.loss(z).mean().backward()
        optimizer.step()
    assert quantizer.loss(z).mean().item() < 0.7 * before


def test_it_is_made_again_and_mistakes_are_refused():
    quantizer, z = fitted(3, 64), make_vectors(50)
    again = make_quantizer(quantizer.config())
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again.encode(z), quantizer.encode(z))
    with pytest.raises(ValueError, match=r"12 dimensions among its books: take one of \[1, 2, 3, 4, 6, 12\], not 5"):
        FSQ(WIDTH, 5, 64)
