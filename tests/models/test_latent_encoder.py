import pytest
import torch

from models.latent_encoder import LatentEncoder, Upsampler
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


def test_z_keeps_the_order_of_time():
    """Average pooling is over neighbours: without attention, z of one place depends on its own frames alone."""
    config = LatentEncoderConfig(**{**SMALL, "encoder_depth": 0}, pooling=4)
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
    g = LatentEncoder(LatentEncoderConfig(**SMALL, pooling=4, magnitudes=True))
    with torch.no_grad():
        g.project_in.weight[:, :8] = 0
    x0 = torch.randn(1, 8, 12)
    torch.testing.assert_close(g(-x0), g(x0))
    assert not torch.allclose(g(2 * x0), g(x0))


def test_attention_tells_positions_apart():
    config = LatentEncoderConfig(**SMALL, pooling=2)
    g = LatentEncoder(config)
    x0 = torch.randn(1, 8, 12)
    assert not torch.allclose(g(x0.flip(-1)), g(x0).flip(-1), atol=1e-4)


def test_frames_that_do_not_divide_are_refused():
    g = LatentEncoder(LatentEncoderConfig(**SMALL, pooling=9))
    with pytest.raises(ValueError, match="multiple"):
        g(torch.randn(1, 8, 10))


def test_problems_name_the_mend():
    config = LatentEncoderConfig(**{**SMALL, "width": 18}, pooling=9, patch_size=2)
    assert [problem.split("=")[0] for problem in config.problems()] == [
        "latent_encoder.patch_size",
        "latent_encoder.width",
    ]
