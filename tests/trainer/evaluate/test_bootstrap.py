"""Confidence intervals against scipy's, and what they must say of sets that are alike and of sets that are not."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from trainer.evaluate import bootstrap
from trainer.evaluate.bootstrap import SetReplicates
from trainer.evaluate.figures import frechet_distance, kernel_distance


def values(clips: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 3.0, clips)


def sets(clips: int, windows: int = 3, dim: int = 4, shift: float = 0.0, seed: int = 0) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(shift + rng.normal(), 1, (windows, dim))).float() for _ in range(clips)]


# ---- means


def test_the_interval_is_scipys():
    sample = values()
    expected = scipy.stats.bootstrap((sample,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    found = bootstrap.interval(bootstrap.mean_replicates(sample))
    np.testing.assert_allclose(found, expected.confidence_interval, rtol=0.03)


def test_a_difference_is_paired():
    one = values()
    other = one + 0.3 + 0.1 * np.random.default_rng(1).normal(size=len(one))  # far less than the clips differ
    paired = bootstrap.interval(bootstrap.mean_replicates(other - one))
    expected = scipy.stats.bootstrap(
        (other, one), lambda a, b: np.mean(a - b), n_resamples=5000, method="percentile", paired=True,
        vectorized=False, rng=1,
    )  # fmt: skip
    np.testing.assert_allclose(paired, expected.confidence_interval, rtol=0.05)
    assert bootstrap.excludes_zero(paired)
    alone = [bootstrap.interval(bootstrap.mean_replicates(sample)) for sample in (one, other)]
    assert alone[0][1] > alone[1][0]  # which the two intervals by themselves would not have told


def test_it_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    draws = rng.normal(5.0, 2.0, (300, 50))
    bounds = [bootstrap.interval(bootstrap.mean_replicates(draw)) for draw in draws]
    assert 0.90 < np.mean([low < 5.0 < high for low, high in bounds]) < 0.98


def test_clips_without_a_value_are_left_out():
    sample = values()
    with_gaps = np.concatenate([sample, np.full(10, np.nan)])
    found = bootstrap.interval(bootstrap.mean_replicates(with_gaps))
    assert found[0] < sample.mean() < found[1]
    assert bootstrap.interval(bootstrap.mean_replicates(np.full(5, np.nan))) is None
    assert not bootstrap.excludes_zero(None)


def test_the_same_in_every_process():
    assert bootstrap.counts(7).shape == (bootstrap.REPLICATES, 7)
    assert (bootstrap.counts(7).sum(1) == 7).all()
    bootstrap.counts.cache_clear()
    first = bootstrap.counts(7).copy()
    bootstrap.counts.cache_clear()
    np.testing.assert_array_equal(first, bootstrap.counts(7))
    np.testing.assert_array_equal(*(bootstrap.mean_replicates(values()) for _ in range(2)))


# ---- distances of sets


def drawn(rows: list[torch.Tensor], weights: np.ndarray) -> torch.Tensor:
    return torch.cat([row for row, weight in zip(rows, weights, strict=True) for _ in range(int(weight))])


@pytest.mark.parametrize("dim", [4, 60])  # fewer and more than there are rows
def test_a_frechet_replicate_is_the_distance_of_what_was_drawn(dim):
    reference, estimate = sets(8, dim=dim), sets(8, dim=dim, shift=0.5, seed=1)
    replicates = SetReplicates(reference, replicates=5).frechet(estimate, value=100.0)
    plain = np.array([frechet_distance(drawn(reference, w), drawn(estimate, w)) for w in bootstrap.counts(8, 5)])
    np.testing.assert_allclose(replicates, plain - plain.mean() + 100.0, rtol=1e-6)


def test_kernel_replicates_hold_the_distance_itself_where_each_clip_is_drawn_once(monkeypatch):
    reference, estimate = sets(8), sets(8, shift=0.5, seed=1)
    monkeypatch.setattr(bootstrap, "counts", lambda clips, replicates: np.ones((1, clips)))
    found = SetReplicates(reference, replicates=1).kernel(estimate)
    assert found[0] == pytest.approx(kernel_distance(torch.cat(reference), torch.cat(estimate)), rel=1e-9)


def test_kernel_replicates_do_not_drift_from_the_distance():
    reference, estimate = sets(30), sets(30, seed=1)
    found = SetReplicates(reference, replicates=400).kernel(estimate)
    value = kernel_distance(torch.cat(reference), torch.cat(estimate))
    assert abs(found.mean() - value) < 0.25 * found.std()  # pairs of copies would lift it by more than twice that


def test_sets_that_differ_are_told_apart_and_others_not():
    reference, near, far = sets(30), sets(30, seed=1), sets(30, shift=2.0, seed=2)
    replicates = SetReplicates(reference)
    for key in ("kernel", "frechet"):
        distance = {"kernel": kernel_distance, "frechet": frechet_distance}[key]
        found = []
        for estimate in (near, far):
            value = distance(torch.cat(reference), torch.cat(estimate))
            found.append(getattr(replicates, key)(estimate, *([value] if key == "frechet" else [])))
        assert bootstrap.excludes_zero(bootstrap.interval(found[1] - found[0]))
    assert not bootstrap.excludes_zero(bootstrap.interval(replicates.kernel(near)))
