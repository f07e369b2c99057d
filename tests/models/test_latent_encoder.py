import pytest
import torch

from models.block_pca import BlockMoments
from models.latent_encoder import MEAN_MAGNITUDE, LatentEncoder, Upsampler, start_features
from models.sizes import LatentEncoderConfig

SMALL = {"latent_channels": 8, "z_channels": 4, "width": 16, "encoder_depth": 1, "upsampler_depth": 1, "heads": 2}


@pytest.mark.parametrize(("pooling", "patch_size", "dit_patch_size"), [(4, 1, 1), (9, 3, 3), (9, 1, 3), (100, 4, 2)])
def test_shapes_at_the_papers_rates(pooling, patch_size, dit_patch_size):
    config = LatentEncoderConfig(**SMALL, pooling=pooling, patch_size=patch_size)
    g, f = LatentEncoder(config), Upsampler(config, dit_width=12, dit_patch_size=dit_patch_size)
    z = g(torch.randn(2, 8, 3 * pooling))
    assert z.shape == (2, 4, 3)
    assert f(z).shape == (2, 12, 3 * pooling // dit_patch_size)


def test_condition_starts_at_zero_and_its_gradient_reaches_f_at_once():
    config = LatentEncoderConfig(**SMALL, pooling=4)
    g, f = LatentEncoder(config), Upsampler(config, dit_width=12, dit_patch_size=1)
    condition = f(g(torch.randn(2, 8, 8)))
    assert condition.abs().max() == 0
    condition.sum().backward()
    assert f.project_out.weight.grad.abs().max() > 0


@pytest.mark.parametrize("pool", ["places", "average"])
def test_z_keeps_the_order_of_time(pool):
    """Without attention, each z depends on its own frames alone."""
    config = LatentEncoderConfig(**{**SMALL, "encoder_depth": 0}, pooling=4, pool=pool, start="random")
    g = LatentEncoder(config)
    x0 = torch.randn(1, 8, 12)
    changed = x0.clone()
    changed[..., 4:8] += 1
    difference = (g(changed) - g(x0)).abs().amax(dim=(0, 1))
    assert difference[1] > 0
    assert difference[0] == 0
    assert difference[2] == 0


def test_magnitudes_are_seen_whatever_the_signs():
    """With the weights of x0 itself at zero, flipping signs changes nothing and other magnitudes do."""
    g = LatentEncoder(LatentEncoderConfig(**SMALL, pooling=4, magnitudes=True, start="random"))
    with torch.no_grad():
        g.project_in.weight[:, :8] = 0
    x0 = torch.randn(1, 8, 12)
    torch.testing.assert_close(g(-x0), g(x0))
    assert not torch.allclose(g(2 * x0), g(x0))


def test_places_tell_the_frames_of_a_z_apart_and_the_average_does_not():
    """Without attention, the average of the places is the same in any order of the frames."""
    x0 = torch.randn(1, 8, 12)
    turned = x0.unflatten(-1, (3, 4)).flip(-1).flatten(-2)
    for pool, alike in (("average", True), ("places", False)):
        g = LatentEncoder(LatentEncoderConfig(**{**SMALL, "encoder_depth": 0}, pooling=4, pool=pool, start="random"))
        assert torch.allclose(g(turned), g(x0), atol=1e-6) == alike


def test_f_gives_each_place_its_own_vector():
    """Without the embedding of places and without attention, the average gives all places of a z the same."""
    z = torch.randn(1, 4, 3)
    for pool, alike in (("average", True), ("places", False)):
        f = Upsampler(
            LatentEncoderConfig(**{**SMALL, "upsampler_depth": 0}, pooling=4, pool=pool), dit_width=12, dit_patch_size=1
        )
        with torch.no_grad():
            f.place.zero_()
            f.project_out.weight.normal_()
        places = f(z).unflatten(-1, (3, 4))
        assert torch.allclose(places, places[..., :1].expand_as(places), atol=1e-6) == alike


def test_z_starts_as_the_components_of_its_block_alone():
    config = LatentEncoderConfig(**SMALL, pooling=4, signed_channels=3)
    g, x0 = LatentEncoder(config), torch.randn(2, 8, 12)
    moments = BlockMoments(4, 8)
    moments.add(start_features(torch.randn(64, 8, 4), config)[:, 0])
    g.start.fit(moments, whitening=0.5)
    features = torch.cat([x0[:, :3].abs() - MEAN_MAGNITUDE, x0[:, 3:]], dim=1)
    blocks = features.transpose(1, 2).unflatten(1, (3, 4)).flatten(2)
    torch.testing.assert_close(g(x0), g.start(blocks).transpose(1, 2))
    g(x0).square().sum().backward()
    assert g.project_out.weight.grad.abs().max() > 0


@pytest.mark.parametrize("patch_size", [1, 4])
def test_f_starts_with_the_features_that_z_stands_for(patch_size):
    """What f gives the places is a fixed linear image of those features, with no less information than it can hold."""
    config = LatentEncoderConfig(**{**SMALL, "width": 8}, pooling=8, patch_size=patch_size)
    moments = BlockMoments(8, 8)
    moments.add(torch.randn(200, 8, 8))
    g, f = LatentEncoder(config), Upsampler(config, dit_width=12, dit_patch_size=1)
    g.start.fit(moments, whitening=0.5)
    f.start_from(g.start)
    z = torch.randn(50, 4)
    features = (g.start.features(z) - g.start.mean).unflatten(1, (config.tokens_per_z, -1)).flatten(0, 1)
    places = f.spread(z).detach().unflatten(1, (config.tokens_per_z, -1)).flatten(0, 1)
    image = torch.linalg.lstsq(features, places).solution
    torch.testing.assert_close(features @ image, places, atol=1e-4, rtol=0)
    assert float(places.square().sum(1).mean()) == pytest.approx(float(features.square().sum(1).mean()), rel=0.5)


def test_at_the_lowest_rate_the_places_stay_a_small_part_of_the_weights():
    sizes = LatentEncoderConfig(pooling=100, width=768, encoder_depth=6, upsampler_depth=3, heads=12)
    with torch.device("meta"):
        parts = LatentEncoder(sizes), Upsampler(sizes, dit_width=1024, dit_patch_size=1)
    for part, places in zip(parts, ("project_out", "spread"), strict=True):
        weights = sum(parameter.numel() for parameter in part.parameters())
        assert getattr(part, places).weight.numel() == 100 * 128 * 64 < 0.04 * weights


def test_attention_tells_positions_apart():
    config = LatentEncoderConfig(**SMALL, pooling=2, start="random")
    g = LatentEncoder(config)
    x0 = torch.randn(1, 8, 12)
    assert not torch.allclose(g(x0.flip(-1)), g(x0).flip(-1), atol=1e-4)


def test_frames_that_do_not_divide_are_refused():
    g = LatentEncoder(LatentEncoderConfig(**SMALL, pooling=9))
    with pytest.raises(ValueError, match="multiple"):
        g(torch.randn(1, 8, 10))


def test_unknown_kinds_are_refused():
    problems = LatentEncoderConfig(pool="max", start="zero").problems()
    assert [problem.split(":")[0] for problem in problems] == [
        "latent_encoder.pool=max is unknown",
        "latent_encoder.start=zero is unknown",
    ]


def test_problems_name_the_mend():
    config = LatentEncoderConfig(**{**SMALL, "width": 18}, pooling=9, patch_size=2)
    assert [problem.split("=")[0] for problem in config.problems()] == [
        "latent_encoder.patch_size",
        "latent_encoder.width",
    ]
