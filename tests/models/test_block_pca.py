import numpy as np
import pytest
import torch

from models.block_pca import BlockMoments, BlockPCA


def blocks_of_rank(rows: int, frames: int, channels: int, rank: int, *, seed: int = 0) -> torch.Tensor:
    """Draw blocks (rows, frames, channels) that vary in `rank` directions of different variance, about a mean."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(frames * channels, rank, generator=generator, dtype=torch.float64))[0]
    amounts = torch.randn(rows, rank, generator=generator, dtype=torch.float64) * torch.arange(rank, 0, -1)
    return (amounts @ axes.T + 3.0).unflatten(1, (frames, channels)).float()


def fitted(blocks: torch.Tensor, z_channels: int, *, whitening: float = 0.5, parts: int = 4) -> BlockPCA:
    moments = BlockMoments(*blocks.shape[1:])
    for part in blocks.chunk(parts):
        moments.add(part)
    pca = BlockPCA(blocks[0].numel(), z_channels)
    pca.fit(moments, whitening=whitening)
    return pca


def test_directions_and_variances_are_those_of_numpys_svd():
    blocks = blocks_of_rank(500, 3, 5, rank=15)
    pca = fitted(blocks, 6)
    rows = blocks.flatten(1).double().numpy()
    _, singular, axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert np.abs((axes[:6] * pca.directions.double().numpy()).sum(1)) == pytest.approx(np.ones(6), abs=1e-4)
    along = (rows - rows.mean(0)) @ pca.directions.double().numpy().T
    assert along.std(0) == pytest.approx(singular[:6] / np.sqrt(500), rel=1e-4)


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_z_has_a_mean_variance_of_1_whatever_the_whitening(whitening):
    blocks = blocks_of_rank(2000, 4, 6, rank=8)
    z = fitted(blocks, 8, whitening=whitening)(blocks.flatten(1))
    assert z.mean(0).abs().max() < 1e-4
    assert z.var(0, correction=0).mean() == pytest.approx(1, rel=1e-4)
    spread = z.std(0) / z.std(0)[-1]
    plain = fitted(blocks, 8, whitening=0.0)(blocks.flatten(1)).std(0)
    torch.testing.assert_close(spread, (plain / plain[-1]) ** (1 - whitening), rtol=1e-3, atol=0)


def test_what_the_directions_hold_comes_back_exactly():
    blocks = blocks_of_rank(300, 3, 5, rank=4)
    pca = fitted(blocks, 4, whitening=0.5)
    torch.testing.assert_close(pca.features(pca(blocks.flatten(1))), blocks.flatten(1), atol=1e-4, rtol=1e-4)


def test_channels_without_a_direction_stay_zero():
    blocks = blocks_of_rank(300, 3, 5, rank=4)
    z = fitted(blocks, 9)(blocks.flatten(1))
    assert z[:, :4].std(0).min() > 0.1
    assert z[:, 4:].abs().max() == 0


def test_the_sums_do_not_depend_on_how_the_blocks_arrive():
    blocks = blocks_of_rank(256, 3, 5, rank=6)
    one, other = fitted(blocks, 6, parts=1), fitted(blocks, 6, parts=16)
    torch.testing.assert_close(one.directions, other.directions, atol=1e-6, rtol=0)


def test_before_the_fit_z_is_zero():
    assert BlockPCA(15, 4)(torch.randn(7, 15)).abs().max() == 0


def test_long_blocks_are_reduced_to_the_slow_part_of_their_variation():
    """Of 100 frames of 128 channels, 16 orders of the DCT are kept: order 3 returns, order 40 does not."""
    time = (torch.arange(100) + 0.5) / 100
    slow, fast = (torch.cos(torch.pi * order * time) for order in (3, 40))
    amounts = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    channel = torch.nn.functional.one_hot(torch.tensor(5), 128).float()
    blocks = torch.einsum("rk,kt,c->rtc", amounts, torch.stack([slow, fast]), channel)
    pca = fitted(blocks, 4)
    back = pca.features(pca(blocks.flatten(1))).unflatten(1, (100, 128))
    slow_alone = torch.einsum("r,t,c->rtc", amounts[:, 0], slow, channel)
    torch.testing.assert_close(back, slow_alone, atol=1e-4, rtol=0)
