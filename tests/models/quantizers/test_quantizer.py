from __future__ import annotations

import multiprocessing
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from torch import Tensor

from models.quantizers import residual as module
from models.quantizers.quantizer import make_quantizer
from models.quantizers.residual import ResidualQuantizer

WIDTH, BOOKS, SIZE = 16, 6, 16


def make_vectors(count: int, *, seed: int = 0) -> Tensor:
    """Correlated vectors of unequal spread and a mean far from 0, as z has them."""
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99)) * torch.linspace(0.2, 2, WIDTH)
    return 5 + torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) @ mixing


def relative_error(quantizer: ResidualQuantizer, z: Tensor, **options: int) -> float:
    z_q = quantizer.decode(quantizer.encode(z, **options)).detach()
    return float((z_q - z).square().mean() / (z - z.mean(0)).square().mean())


@pytest.fixture(scope="module")
def fitted() -> ResidualQuantizer:
    quantizer = ResidualQuantizer(WIDTH, BOOKS, SIZE)
    quantizer.fit(make_vectors(4000), seed=1)
    return quantizer


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return make_vectors(500, seed=5)


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,), (2, 0, 4)])
def test_shapes_and_types(fitted, shape):
    z = torch.randn(*shape, WIDTH)
    codes = fitted.encode(z)
    assert codes.shape == (*shape, BOOKS)
    assert codes.dtype == torch.int64
    assert not codes.numel() or (codes.min() >= 0 and codes.max() < SIZE)
    assert fitted.decode(codes).shape == z.shape


def test_every_more_book_brings_the_decoded_vector_nearer(fitted, held_out):
    codes = fitted.encode(held_out)
    errors = [(fitted.decode(codes[:, :m]) - held_out).square().mean().item() for m in range(1, BOOKS + 1)]
    assert all(later < 0.9 * earlier for earlier, later in pairwise(errors))
    own = [relative_error(fitted, held_out, books=m) for m in range(1, BOOKS + 1)]
    variance = (held_out - held_out.mean(0)).square().mean().item()
    prefix = [error / variance for error in errors]
    # codes searched for fewer books serve them better than the beginning of codes searched for all
    assert all(o <= p + 1e-6 for o, p in zip(own, prefix, strict=True))
    assert sum(own[:-1]) < sum(prefix[:-1]) - 1e-3
    assert own[-1] < 0.2


def test_decoding_is_the_restored_sum_of_the_codewords(fitted):
    codes = torch.tensor([3, 1, 4])
    words = [fitted.codebooks[m, codes[m]] for m in range(3)]
    torch.testing.assert_close(fitted.decode(codes), sum(words) * fitted.scale + fitted.mean)


def test_a_wide_enough_beam_finds_the_best_codes_of_all():
    quantizer = ResidualQuantizer(3, 3, 4, beam=16)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(quantizer.codebooks, generator=generator)
    z = torch.randn(50, 3, generator=generator)
    everything = torch.tensor(list(product(range(4), repeat=3)))
    nearest = torch.cdist(z, quantizer.decode(everything)).argmin(dim=1)
    assert torch.equal(quantizer.encode(z), everything[nearest])


def test_a_beam_of_1_is_greedy(fitted, held_out):
    greedy = make_quantizer(fitted.config() | {"beam": 1})
    greedy.load_state_dict(fitted.state_dict())
    residual, expected = fitted.standardise(held_out), []
    for codebook in fitted.codebooks.detach():
        code = torch.cdist(residual, codebook).argmin(dim=1)
        residual = residual - codebook[code]
        expected.append(code)
    assert torch.equal(greedy.encode(held_out), torch.stack(expected, dim=1))


@pytest.mark.parametrize("beam", [1, 4, 32])
def test_the_search_is_as_good_as_faiss_at_the_same_beam(fitted, held_out, beam):
    import faiss

    ours = ResidualQuantizer(WIDTH, BOOKS, SIZE, beam=beam)
    ours.load_state_dict(fitted.state_dict())
    theirs = faiss.ResidualQuantizer(WIDTH, BOOKS, SIZE.bit_length() - 1)
    faiss.copy_array_to_vector(fitted.codebooks.detach().numpy().ravel(), theirs.codebooks)
    theirs.is_trained, theirs.max_beam_size = True, beam
    points = fitted.standardise(held_out).numpy()
    expected = np.square(theirs.decode(theirs.compute_codes(points)) - points).mean()
    found = np.square(fitted.standardise(ours.decode(ours.encode(held_out))).detach().numpy() - points).mean()
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_wider_beam_is_nearer(fitted, held_out):
    def error(beam: int) -> float:
        quantizer = ResidualQuantizer(WIDTH, BOOKS, SIZE, beam=beam)
        quantizer.load_state_dict(fitted.state_dict())
        return relative_error(quantizer, held_out)

    assert error(32) < 0.97 * error(4) < 0.94 * error(1)


def test_the_codes_do_not_depend_on_how_the_search_is_cut(fitted, held_out, monkeypatch):
    whole = fitted.encode(held_out)
    largest = []
    search = module._beam_search
    monkeypatch.setattr(module, "_SEARCH_NUMBERS", 7 * fitted.beam * (SIZE + WIDTH))
    monkeypatch.setattr(module, "_beam_search", lambda x, *rest: largest.append(len(x)) or search(x, *rest))
    cut = fitted.encode(held_out)
    assert max(largest) == 7
    # rounding may tip a tie, never a difference
    errors = ((fitted.decode(codes) - held_out).square().sum(dim=-1) for codes in (whole, cut))
    torch.testing.assert_close(*errors, rtol=1e-4, atol=0)
    assert (whole == cut).all(dim=1).float().mean() > 0.99


def test_half_precision_around_it_does_not_change_the_codes(fitted, held_out):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = fitted.encode(held_out)
    assert torch.equal(codes, fitted.encode(held_out))


# --- loss -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_squared_error_summed_over_prefixes(fitted, held_out):
    codes = fitted.encode(held_out)
    expected = sum(
        (fitted.standardise(fitted.decode(codes[:, :m])) - fitted.standardise(held_out)).square().mean(dim=1)
        for m in range(1, BOOKS + 1)
    )
    torch.testing.assert_close(fitted.loss(held_out), expected)


def test_the_losss_gradient_reaches_the_chosen_codewords_and_improves_them(fitted, held_out):
    quantizer = make_quantizer(fitted.config())
    quantizer.load_state_dict(fitted.state_dict())
    before = quantizer.loss(held_out).mean()
    before.backward()
    used = torch.zeros(BOOKS, SIZE, dtype=torch.bool)
    codes = quantizer.encode(held_out)
    for book in range(BOOKS):
        used[book, codes[:, book]] = True
    assert torch.equal(quantizer.codebooks.grad.abs().sum(dim=-1) > 0, used)
    with torch.no_grad():
        quantizer.codebooks -= 0.05 * quantizer.codebooks.grad
    assert quantizer.loss(held_out).mean() < before


# --- fitting ----------------------------------------------------------------------------------------------------------


def test_a_fit_is_the_same_for_the_same_seed_and_another_for_another(fitted):
    again, other = (ResidualQuantizer(WIDTH, BOOKS, SIZE) for _ in range(2))
    again.fit(make_vectors(4000), seed=1)
    other.fit(make_vectors(4000), seed=2)
    assert all(torch.equal(value, fitted.state_dict()[name]) for name, value in again.state_dict().items())
    assert not torch.equal(other.codebooks, fitted.codebooks)


@pytest.mark.parametrize("beam", [1, 4])
def test_a_fit_is_faisss_own_to_the_bit_and_tells_each_codebook(monkeypatch, beam):
    vectors, told = make_vectors(3000), []
    theirs = faiss.ResidualQuantizer(WIDTH, BOOKS, 4)
    theirs.train_type = faiss.ResidualQuantizer.Train_default | faiss.ResidualQuantizer.Skip_codebook_tables
    theirs.max_beam_size, theirs.cp.seed = beam, 7
    theirs.cp.max_points_per_centroid, theirs.cp.min_points_per_centroid = 256, 1
    ours = ResidualQuantizer(WIDTH, BOOKS, SIZE)
    monkeypatch.setattr(module, "_FIT_DISTANCES", 64 * 1000 * beam)  # three parts
    ours.fit(vectors, seed=7, fit_beam=beam, progress=lambda done, total: told.append((done, total)))
    theirs.train(ours.standardise(vectors).numpy())
    expected = faiss.vector_to_array(theirs.codebooks).reshape(BOOKS, SIZE, WIDTH)
    assert np.array_equal(ours.codebooks.detach().numpy(), expected)
    assert told == [(book, BOOKS) for book in range(1, BOOKS + 1)]


def test_a_fit_does_not_mind_scale_and_shift(fitted, held_out):
    moved = ResidualQuantizer(WIDTH, BOOKS, SIZE)
    moved.fit(1e4 * make_vectors(4000) - 3e4, seed=1)
    assert relative_error(moved, 1e4 * held_out - 3e4) == pytest.approx(relative_error(fitted, held_out), rel=0.05)


def test_standardised_vectors_have_no_mean_and_unit_spread_in_all(fitted):
    standardised = fitted.standardise(make_vectors(4000))
    torch.testing.assert_close(standardised.mean(dim=0), torch.zeros(WIDTH), atol=1e-4, rtol=0)
    assert standardised.square().mean().item() == pytest.approx(1, abs=1e-4)
    assert standardised.std(dim=0).max() > 2 * standardised.std(dim=0).min()  # one scalar for all dimensions
    torch.testing.assert_close(fitted.restore(standardised), make_vectors(4000))


def test_a_limit_keeps_the_statistics_of_all_and_fits_on_a_draw():
    limited, whole = (ResidualQuantizer(WIDTH, 2, SIZE) for _ in range(2))
    limited.fit(make_vectors(4000), seed=1, limit=700)
    whole.fit(make_vectors(4000), seed=1)
    assert torch.equal(limited.mean, whole.mean)
    assert torch.equal(limited.scale, whole.scale)
    assert not torch.equal(limited.codebooks, whole.codebooks)
    assert relative_error(limited, make_vectors(500, seed=5)) < 1.2 * relative_error(whole, make_vectors(500, seed=5))


def test_training_with_a_beam_helps(held_out):
    def error(beam: int) -> float:
        quantizer = ResidualQuantizer(WIDTH, BOOKS, SIZE)
        quantizer.fit(make_vectors(4000), seed=1, fit_beam=beam)
        return relative_error(quantizer, held_out)

    assert error(8) < error(1)


@pytest.mark.parametrize("distinct", [1, 3])
def test_vectors_that_repeat_are_fitted_without_harm(distinct):
    vectors = make_vectors(distinct).repeat(1000 // distinct, 1)
    quantizer = ResidualQuantizer(WIDTH, 2, SIZE)
    quantizer.fit(vectors, seed=0)
    assert all(torch.isfinite(value).all() for value in quantizer.state_dict().values())
    torch.testing.assert_close(quantizer.decode(quantizer.encode(vectors)), vectors, atol=1e-3, rtol=1e-3)


def test_few_vectors_warn_and_too_few_are_refused(caplog):
    quantizer = ResidualQuantizer(WIDTH, 2, SIZE)
    quantizer.fit(make_vectors(639), seed=0)
    assert [record.getMessage() for record in caplog.records] == [
        "639 vectors are few for codebooks of 16, which will overfit: use at least 640"
    ]
    caplog.clear()
    quantizer.fit(make_vectors(640), seed=0)
    assert not caplog.records
    before = quantizer.codebooks.clone()
    for count, limit in [(SIZE - 1, None), (0, None), (1000, SIZE - 1)]:
        with pytest.raises(ValueError, match=r"cannot fill codebooks of 16"):
            quantizer.fit(make_vectors(count), seed=0, limit=limit)
    assert torch.equal(quantizer.codebooks, before)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.zeros(1000, WIDTH + 1), "not \\(1000, 17\\)"),
        (torch.zeros(1000), "not \\(1000,\\)"),
        (torch.full((1000, WIDTH), torch.nan), "not all finite"),
        (torch.full((1000, WIDTH), torch.inf), "not all finite"),
    ],
)
def test_vectors_of_another_kind_are_refused(vectors, message):
    with pytest.raises(ValueError, match=message):
        ResidualQuantizer(WIDTH, 2, SIZE).fit(vectors, seed=0)


def fit_on_ties() -> str:
    """The codebooks fitted on repeated vectors: those make ties, which rounding decides."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(300, 64, generator=generator)
    quantizer = ResidualQuantizer(64, 2, 64)
    quantizer.fit(distinct[torch.randint(300, (3000,), generator=generator)], seed=1)
    return quantizer.codebooks.detach().numpy().tobytes().hex()


FIT_ON_THREE_THREADS = """
import faiss, sys, torch
torch.set_num_threads(3), faiss.omp_set_num_threads(3)
torch.randn(600, 600) @ torch.randn(600, 600)
sys.path.append("tests/models/quantizers")
from test_quantizer import fit_on_ties
sys.stdout.write(fit_on_ties())
assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (3, 3)
torch.randn(600, 600) @ torch.randn(600, 600)
"""


def test_neither_the_number_of_threads_nor_the_order_of_imports_changes_a_fit():
    command, root = [sys.executable, "-c", FIT_ON_THREE_THREADS], Path(__file__).parents[3]
    there = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True).stdout
    assert there == fit_on_ties()


def fit_and_send(connection) -> None:
    torch.set_num_threads(1)  # torch itself hangs without, once its parent has used threads
    quantizer = ResidualQuantizer(WIDTH, BOOKS, SIZE)
    quantizer.fit(make_vectors(4000), seed=1)
    connection.send(quantizer.codebooks.detach().numpy())


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.randn(600, 600) @ torch.randn(600, 600)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_a_forked_process_fits_after_its_parent_has(fitted):
    # both libraries bring an OpenMP runtime, and its threads do not survive a fork
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=fit_and_send, args=(sender,))
    child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert np.array_equal(receiver.recv(), fitted.codebooks.detach().numpy())
    finally:
        child.kill()
        child.join()


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["residual", "qinco2"])
def test_idle_codewords_find_work_and_no_error_grows(kind):
    vectors = make_vectors(2000)
    quantizer = make_quantizer({"kind": kind, "width": vectors.shape[1], "books": 3, "size": 16, "beam": 4})
    quantizer.fit(vectors, seed=0)
    with torch.no_grad():
        for book in (0, 2):
            quantizer.codebooks[book, 5:9] = 100.0
        if kind == "qinco2":
            quantizer.preselection[1, 5:9] = 100.0
    before = relative_error(quantizer, vectors)
    assert quantizer.revive(vectors, rounds=0) == 8
    told: list[tuple[int, int]] = []
    assert quantizer.revive(vectors, progress=lambda done, total: told.append((done, total))) == 0
    assert told == [(search, 9) for search in range(1, len(told) + 1)]
    assert 2 <= len(told) <= 9
    used = [len(torch.unique(codes)) for codes in quantizer.encode(vectors).T]
    assert used == [16, 16, 16]
    assert relative_error(quantizer, vectors) < before


def test_codewords_that_no_vector_can_use_are_told():
    quantizer = make_quantizer({"kind": "residual", "width": 4, "books": 2, "size": 16})
    quantizer.fit(torch.randn(3, 4).repeat(20, 1), seed=0)
    assert quantizer.revive(torch.randn(3, 4)) >= 2 * (16 - 3)


def test_a_quantizer_is_made_again_from_its_config_and_state(fitted, held_out):
    again = make_quantizer(fitted.config())
    again.load_state_dict(fitted.state_dict())
    assert again.config() == fitted.config()
    assert torch.equal(again.encode(held_out), fitted.encode(held_out))
    assert torch.equal(again.decode(again.encode(held_out)), fitted.decode(fitted.encode(held_out)))


@pytest.mark.parametrize(("books", "size", "bits"), [(12, 256, 96), (15, 256, 120), (10, 4096, 120), (25, 4096, 300)])
def test_bits_are_the_papers(books, size, bits):
    quantizer = ResidualQuantizer(2, books, size)
    assert quantizer.bits() == bits
    assert quantizer.bits(books - 1) * books == bits * (books - 1)


@pytest.mark.parametrize(("size", "nearest"), [(1000, 1024), (255, 256), (3, 4), (1, 2), (0, 2), (-8, 2), (5, 4)])
def test_a_size_that_is_no_power_of_two_is_refused_with_the_nearest(size, nearest):
    with pytest.raises(ValueError, match=f"nearest is {nearest}$"):
        ResidualQuantizer(WIDTH, BOOKS, size)


def test_other_mistakes_are_refused(fitted):
    for wrong in ({"width": 0}, {"books": 0}, {"beam": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            make_quantizer(fitted.config() | wrong)
    for books in (0, BOOKS + 1):
        with pytest.raises(ValueError, match=f"has {BOOKS} books"):
            fitted.bits(books)
        with pytest.raises(ValueError, match=f"has {BOOKS} books"):
            fitted.encode(torch.zeros(1, WIDTH), books=books)
        with pytest.raises(ValueError, match=f"has {BOOKS} books"):
            fitted.decode(torch.zeros(1, books, dtype=torch.int64))
    with pytest.raises(ValueError, match="unknown quantizer kind 'product': choose one of qinco2, residual, fsq"):
        make_quantizer(fitted.config() | {"kind": "product"})
    with pytest.raises(ValueError, match="unknown quantizer kind 'None'"):
        make_quantizer({})
    with pytest.raises(ValueError, match=r"residual.*depth"):
        make_quantizer(fitted.config() | {"depth": 3})
