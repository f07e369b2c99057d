from __future__ import annotations

import pytest
import torch

from trainer.effective_rank import covariance, effective_rank


@pytest.mark.parametrize(
    ("variances", "rank"),
    [
        ([1.0] * 8, 8),
        ([5.0], 1),
        ([98.9, 1.1], 2),
        ([99.1, 0.9], 1),
        ([0.5, 60.0, 39.4, 0.1], 2),  # in whatever order they come
        ([0.0, 0.0], 0),
    ],
)
def test_it_counts_the_directions_that_hold_99_percent(variances, rank):
    assert effective_rank(torch.tensor(variances).diag()) == rank


def test_it_does_not_mind_rotation_scale_and_shift():
    generator = torch.Generator().manual_seed(0)
    three_of_eight = torch.randn(500, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
    assert effective_rank(covariance(three_of_eight)) == 3
    assert effective_rank(covariance(1000 + 1e-3 * three_of_eight.double())) == 3


def test_the_covariance_is_numpys():
    vectors = torch.randn(50, 4) + 7
    torch.testing.assert_close(covariance(vectors), torch.cov(vectors.double().T, correction=0))
