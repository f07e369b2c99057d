from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from trainer.data.order import permute, sample_ids

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


def test_an_epoch_holds_every_sample_once_and_epochs_differ():
    size, epochs = 1000, 5
    ids, epoch = sample_ids(np.arange(size * epochs), size, fingerprint="a", seed=0)
    np.testing.assert_array_equal(epoch, np.repeat(np.arange(epochs), size))
    by_epoch = ids.reshape(epochs, size)
    np.testing.assert_array_equal(np.sort(by_epoch, axis=1), np.tile(np.arange(size), (epochs, 1)))
    assert (by_epoch[:, None] == by_epoch[None]).sum(-1).max(initial=0, where=~np.eye(epochs, dtype=bool)) < 10


def test_a_batch_across_epochs_is_the_same_as_its_parts():
    ids, _ = sample_ids(np.arange(50), 7, fingerprint="a", seed=3)
    one_by_one = [int(sample_ids(np.array([p]), 7, fingerprint="a", seed=3)[0][0]) for p in range(50)]
    assert ids.tolist() == one_by_one
    assert sample_ids(np.arange(5), 1, fingerprint="a", seed=3)[0].tolist() == [0] * 5


def test_seed_and_epoch_are_not_added_up():
    """Epoch 1 of seed 0 is not epoch 0 of seed 1, and a set with another content has another order."""
    size = 1000

    def order(fingerprint: str, seed: int, epoch: int) -> np.ndarray:
        return sample_ids(np.arange(size) + size * epoch, size, fingerprint=fingerprint, seed=seed)[0]

    orders = [
        order("a", 0, 0),
        order("a", 0, 1),
        order("a", 1, 0),
        order("b", 0, 0),
        order("a", -1, 0),
        order("a", 10, 0),
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.sum(one == other) < 10


def test_positions_far_out():
    ids, epochs = sample_ids(np.arange(2**62, 2**62 + 10), 1000, fingerprint="a", seed=0)
    assert epochs[0] == 2**62 // 1000
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
    ids, _ = sample_ids(np.arange(996, 1004), 1000, fingerprint="0123abcd", seed=42)
    assert ids.tolist() == [544, 96, 375, 365, 81, 901, 638, 266]
