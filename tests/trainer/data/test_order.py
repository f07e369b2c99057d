from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import Mixture, Order, permute

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 99, 100, 101, 255, 256, 257, 1000, 4095, 4096, 4097, 65_535, 65_537, 10**5]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_it_is_a_permutation(size, key):
    places = permute(np.arange(size), size, key)
    assert places.dtype == np.int64
    np.testing.assert_array_equal(np.sort(places), np.arange(size))


def test_an_index_goes_to_the_same_place_however_it_is_asked():
    size = 12_345
    all_at_once = permute(np.arange(size), size, 7)
    asked = np.random.default_rng(0).integers(0, size, 500)
    np.testing.assert_array_equal(permute(asked, size, 7), all_at_once[asked])
    assert [int(permute(np.array([i]), size, 7)[0]) for i in asked[:20]] == all_at_once[asked[:20]].tolist()
    assert permute(np.array([], np.int64), size, 7).shape == (0,)


def test_a_key_for_each_index():
    index, size = np.arange(1000), 1000
    keys = np.where(index % 3 == 0, 11, 2**63 + 5).astype(np.uint64)
    expected = np.where(index % 3 == 0, permute(index, size, 11), permute(index, size, 2**63 + 5))
    np.testing.assert_array_equal(permute(index, size, keys), expected)


@pytest.mark.parametrize("size", [10**9, 10**9 + 7, 2**40 - 1, 2**62])
def test_large_sets_by_sampling(size):
    index = np.unique(np.random.default_rng(1).integers(0, size, 200_000))
    places = permute(index, size, 3)
    assert places.min() >= 0
    assert places.max() < size
    assert len(np.unique(places)) == len(index)
    counts = np.histogram(places, bins=64, range=(0, size))[0]
    assert ((counts - len(index) / 64) ** 2 / (len(index) / 64)).sum() < 120  # chi², 63 degrees of freedom


def test_every_order_of_a_small_set_occurs():
    seen = {tuple(permute(np.arange(4), 4, key * 2654435761)) for key in range(500)}
    assert seen == set(permutations(range(4)))


def test_place_and_index_are_not_correlated():
    """Over many keys, the correlation is as widely spread as that of true shuffles: 1/√size."""
    size, keys = 5000, 200
    index = np.arange(size)
    places = np.stack([permute(index, size, 7919 * key) for key in range(keys)])
    correlations = np.array([np.corrcoef(index, row)[0, 1] for row in places])
    assert 0.85 < correlations.std() * np.sqrt(size) < 1.15
    assert abs(correlations.mean()) < 4 / np.sqrt(size * keys)
    neighbours = np.array([np.corrcoef(row[:-1], row[1:])[0, 1] for row in places])
    assert 0.85 < neighbours.std() * np.sqrt(size) < 1.15
    assert abs(neighbours.mean()) < 4 / np.sqrt(size * keys)
    tiles = np.histogram2d(np.tile(index, keys), places.ravel(), bins=10)[0]
    np.testing.assert_allclose(tiles, size * keys / 100, rtol=0.04)


def test_keys_have_unrelated_orders():
    size = 5000
    orders = [permute(np.arange(size), size, key) for key in [0, 1, 2, 3, 1 << 32, 1 << 63]]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.sum(one == other) < 10  # 1 is expected
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(size)


SHUFFLES = [
    {},
    {"shuffle": "windowed", "block": 1, "window": 1, "lanes": 1},
    {"shuffle": "windowed", "block": 8, "window": 100, "lanes": 1},
    {"shuffle": "windowed", "block": 7, "window": 80, "lanes": 3},
    {"shuffle": "windowed", "block": 64, "window": 65_536, "lanes": 64},
]


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_an_epoch_holds_every_sample_once_and_epochs_differ(shuffle):
    size, epochs = 1000, 5
    by_epoch = Order(size, "a", 0, **shuffle).ids(np.arange(size * epochs)).reshape(epochs, size)
    np.testing.assert_array_equal(np.sort(by_epoch, axis=1), np.tile(np.arange(size), (epochs, 1)))
    assert (by_epoch[:, None] == by_epoch[None]).sum(-1).max(initial=0, where=~np.eye(epochs, dtype=bool)) < 10


@settings(deadline=None, max_examples=300)
@given(
    size=st.integers(1, 3000),
    block=st.integers(1, 200),
    lanes=st.integers(1, 70),
    blocks_a_lane=st.integers(1, 50),
    epoch=st.integers(0, 10**6),
    seed=st.integers(0, 2**63),
)
def test_any_window_holds_every_sample_once(size, block, lanes, blocks_a_lane, epoch, seed):
    order = Order(size, "a", seed, "windowed", block, block * lanes * blocks_a_lane, lanes)
    ids = order.ids(epoch * size + np.arange(size))
    np.testing.assert_array_equal(np.sort(ids), np.arange(size))


@pytest.mark.parametrize("size", [10**6, 10**6 + 63])
def test_a_million_in_windows(size):
    ids = Order(size, "a", 1, "windowed", 64, 65_536, 64).ids(np.arange(size))
    assert np.bincount(ids, minlength=size).tolist() == [1] * size


def test_a_billion_in_windows_by_sampling():
    size = 10**9 + 7
    places = np.unique(np.random.default_rng(1).integers(0, size, 200_000))
    ids = Order(size, "a", 1, "windowed", 64, 65_536, 64).ids(places)
    assert len(np.unique(ids)) == len(places)
    counts = np.histogram(ids, bins=64, range=(0, size))[0]
    # whole blocks come or stay away together, but 200,000 places hold hardly two of one block
    assert ((counts - len(ids) / 64) ** 2 / (len(ids) / 64)).sum() < 150


def test_a_window_is_mixed_and_reads_no_block_but_its_own():
    order = Order(64 * 1000, "a", 0, "windowed", block=64, window=64 * 50, lanes=1)
    ids = order.ids(np.arange(64 * 50))
    assert np.count_nonzero(np.diff(np.sort(ids)) != 1) <= 50  # whole blocks, 51 of them if one runs over the end
    assert len(np.unique(ids // 6400)) == 10
    assert abs(np.corrcoef(ids, np.arange(len(ids)))[0, 1]) < 0.1


def test_a_batch_reads_from_nearly_as_many_shards_as_under_a_true_shuffle():
    shards, in_shard = 460, 200
    positions = np.arange(0, shards * in_shard - 256, 1009)[:, None] + np.arange(256)
    distinct = {}
    for kind in ("global", "windowed"):
        order = Order(shards * in_shard, "a", 0, kind, block=64, window=65_536, lanes=64)
        distinct[kind] = np.mean([len(np.unique(order.ids(batch) // in_shard)) for batch in positions])
    assert distinct["windowed"] > 180 / 200 * distinct["global"]


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_ranks_that_take_every_nth_sample_share_no_block(ranks):
    size, block = 64 * 16 * 40, 16
    ids = Order(size, "a", 0, "windowed", block, 64 * 16 * 4, lanes=64).ids(np.arange(size))
    # where a rank's samples, sorted, are not neighbours, one block ends and another begins
    ends = sum(np.count_nonzero(np.diff(np.sort(ids[rank::ranks])) != 1) + 1 for rank in range(ranks))
    assert ends <= size // block + 1  # one block may run over the set's end


def test_none_is_the_order_of_the_shards():
    assert Order(5, "a", 0, "none").ids(np.arange(12)).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_batch_across_epochs_is_the_same_as_its_parts(shuffle):
    for size in (1, 7, 300):
        order = Order(size, "a", 3, **shuffle)
        one_by_one = [int(order.ids(np.array([position]))[0]) for position in range(50)]
        assert order.ids(np.arange(50)).tolist() == one_by_one


def test_seed_and_epoch_are_not_added_up():
    """Epoch 1 of seed 0 is not epoch 0 of seed 1, and a set with another content has another order."""
    size = 1000
    of = [("a", 0, 0), ("a", 0, 1), ("a", 1, 0), ("b", 0, 0), ("a", -1, 0), ("a", 10, 0)]
    orders = [Order(size, name, seed).ids(np.arange(size) + size * epoch) for name, seed, epoch in of]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.sum(one == other) < 10


@pytest.mark.parametrize(
    ("wrong", "mend"),
    [
        ({"size": 0}, "1 to"),
        ({"shuffle": "random"}, "global, windowed, none"),
        ({"shuffle": "windowed", "window": 100, "lanes": 2}, "at least 128"),
    ],
)
def test_orders_that_cannot_be_are_refused(wrong, mend):
    with pytest.raises(ValueError, match=mend):
        Order(**({"size": 5, "fingerprint": "a", "seed": 0} | wrong))


# ---- several streams in one


@settings(deadline=None, max_examples=200)
@given(
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    lanes=st.integers(1, 9),
    cycles=st.integers(1, 9),
    first=st.integers(0, 10**9),
)
def test_a_mixture_is_exact_and_leaves_nothing_out(weights, lanes, cycles, first):
    mixture = Mixture(tuple(weights), 0, lanes)
    count = sum(weights) * lanes * cycles
    start = first * sum(weights) * lanes
    streams, places = mixture.places(start + np.arange(count))
    for number, weight in enumerate(weights):
        expected = first * weight * lanes + np.arange(weight * lanes * cycles)
        np.testing.assert_array_equal(np.sort(places[streams == number]), expected)
    np.testing.assert_array_equal(places % lanes, np.arange(count) % lanes)


def test_each_batch_of_a_mixture_is_exact():
    streams, _ = Mixture((3, 1), 0, 64).places(np.arange(64 * 100))
    assert (np.add.reduceat(streams, np.arange(0, 6400, 4)) == 1).all()


def test_a_mixture_is_mixed():
    streams, _ = Mixture((3, 1), 0, 4).places(np.arange(4000))
    assert np.bincount(streams).tolist() == [3000, 1000]
    runs = np.diff(np.flatnonzero(streams == 1))
    assert len(set(runs.tolist())) > 5


def test_weights_must_be_whole_numbers_above_zero():
    with pytest.raises(ValueError, match=r"weights in data\.mix must be whole numbers of at least 1"):
        Mixture((1, 0), 0)


def test_positions_far_out():
    ids = Order(1000, "a", 0).ids(np.arange(2**62, 2**62 + 10))
    assert ((ids >= 0) & (ids < 1000)).all()


@pytest.mark.parametrize(("index", "size"), [([0], 0), ([0], -1), ([0], 2**62 + 1), ([-1], 5), ([5], 5)])
def test_what_is_outside_is_refused(index, size):
    with pytest.raises(ValueError, match="an order"):
        permute(np.array(index), size, 0)


def test_the_order_never_changes():
    """Runs under way depend on these numbers."""
    far = permute(np.arange(5) * 199_999_999, 10**9, 2**64 - 1)
    assert permute(np.arange(10), 10, 0).tolist() == [1, 7, 6, 2, 4, 8, 0, 9, 3, 5]
    assert far.tolist() == [549957542, 509715677, 988349726, 625399252, 962627818]
    around = np.arange(9_998, 10_004)
    assert Order(10_000, "0123abcd", 42).ids(around).tolist() == [7838, 3596, 9462, 5587, 3767, 6082]
    windowed = Order(10_000, "0123abcd", 42, "windowed", 8, 512, 4)
    assert windowed.ids(around).tolist() == [5579, 5576, 7147, 4884, 6749, 5342]
    assert windowed.ids(np.arange(5)).tolist() == [603, 1673, 4019, 9681, 8893]
    assert Mixture((2, 1), 42, 2).places(np.arange(9))[0].tolist() == [0, 0, 0, 1, 1, 0, 1, 0, 0]
