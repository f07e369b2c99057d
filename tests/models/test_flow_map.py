"""Flow maps on gaussian data, for which the exact way from any noise level to any other is known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models.diffusion import FORMULATIONS, Diffusion, Network, make_diffusion
from models.flow_map import (
    SecondTime,
    angle,
    levels,
    output_of,
    places,
    renoised,
    sample_flow_map,
    step,
    x0_of_step,
)
from models.samplers import sample
from tests.models.test_diffusion import MEAN, STD, batch, column, exact_end, perfect_network

everywhere = pytest.mark.parametrize("name", FORMULATIONS)
SHAPE = (2, 3, 5)


def at(level: float) -> Tensor:
    return torch.full((SHAPE[0],), level, dtype=torch.float64)


def inner(diffusion: Diffusion, share: float) -> float:
    """Return a level above 0 and below the schedule's first: the one at this share of the schedule."""
    return diffusion.schedule(100)[round(100 * share)].item()


def state(diffusion: Diffusion, level: float) -> Tensor:
    x0, noise = batch(*SHAPE, dtype=torch.float64)
    return diffusion.corrupt(x0, noise, at(level))


def exactly(diffusion: Diffusion, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Return x_r on the ODE's way through x_t, along which a gaussian's quantile is kept."""
    (alpha_t, sigma_t), (alpha_r, sigma_r) = (
        tuple(column(c) for c in diffusion.coefficients(level)) for level in (t, r)
    )
    quantile = (x_t - alpha_t * MEAN) / torch.sqrt(alpha_t**2 * STD**2 + sigma_t**2)
    return alpha_r * MEAN + torch.sqrt(alpha_r**2 * STD**2 + sigma_r**2) * quantile


def perfect_flow_map(diffusion: Diffusion):
    """What a flow map would learn: the prediction that takes x_t exactly to x_r."""

    def network_to(t: Tensor, r: Tensor) -> Network:
        def network(x: Tensor, level: Tensor) -> Tensor:
            x_t = x / column(diffusion.c_in(t)) if hasattr(diffusion, "c_in") else x
            return output_of(diffusion, x0_of_step(diffusion, x_t, exactly(diffusion, x_t, t, r), t, r), x_t, t)

        return network

    return network_to


def estimate(diffusion: Diffusion, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return x0_of_step(diffusion, x_t, exactly(diffusion, x_t, t, r), t, r)


def velocity(diffusion: Diffusion, x_t: Tensor, t: float, r: float) -> Tensor:
    """Return the average velocity u(x_t, t, r)."""
    return (x_t - exactly(diffusion, x_t, at(t), at(r))) / (t - r)


@everywhere
def test_the_target_of_a_step_is_what_takes_it_there(name):
    diffusion = make_diffusion(name)
    t, r = at(inner(diffusion, 0.2)), at(inner(diffusion, 0.7))
    x_t, x_r = state(diffusion, t[0].item()), torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(step(diffusion, x0_of_step(diffusion, x_t, x_r, t, r), x_t, t, r), x_r)


@everywhere
def test_an_output_stands_for_its_estimate(name):
    diffusion = make_diffusion(name)
    t = at(inner(diffusion, 0.4))
    x_t, x0 = state(diffusion, t[0].item()), torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(diffusion.x0_of(output_of(diffusion, x0, x_t, t), x_t, t), x0)


@everywhere
def test_at_r_equal_to_t_it_is_the_velocity(name):
    """The estimate of an ever shorter step becomes D's own."""
    diffusion = make_diffusion(name)
    t = inner(diffusion, 0.4)
    x_t = state(diffusion, t)
    own = diffusion.denoise(perfect_network(diffusion), x_t, at(t))
    errors = [
        (estimate(diffusion, x_t, at(t), at(t * (1 - share))) - own).abs().max().item() for share in (0.1, 0.01, 0.001)
    ]
    assert all(shorter < longer / 8 for longer, shorter in pairwise(errors))


@everywhere
def test_steps_in_a_row_are_one_step(name):
    diffusion = make_diffusion(name)
    t, s, r = (at(inner(diffusion, share)) for share in (0.1, 0.5, 0.9))
    x_t = state(diffusion, t[0].item())
    x_s = step(diffusion, estimate(diffusion, x_t, t, s), x_t, t, s)
    x_r = step(diffusion, estimate(diffusion, x_s, s, r), x_s, s, r)
    torch.testing.assert_close(x_r, step(diffusion, estimate(diffusion, x_t, t, r), x_t, t, r))


@everywhere
def test_the_mean_flow_identity_holds(name):
    """u = v - (t - r) du/dt along the ODE's way (arXiv 2505.13447, equation 6)."""
    diffusion = make_diffusion(name)
    t, r = inner(diffusion, 0.3), inner(diffusion, 0.8)
    x_t, width = state(diffusion, t), 1e-4 * t
    later, earlier = (exactly(diffusion, x_t, at(t), at(t + shift)) for shift in (width, -width))
    slope = (velocity(diffusion, later, t + width, r) - velocity(diffusion, earlier, t - width, r)) / (2 * width)
    instantaneous = (later - earlier) / (2 * width)
    torch.testing.assert_close(velocity(diffusion, x_t, t, r), instantaneous - (t - r) * slope, rtol=1e-5, atol=1e-6)


@everywhere
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_a_perfect_one_is_exact_in_any_number_of_steps(name, steps):
    diffusion = make_diffusion(name)
    noise = torch.randn(SHAPE, dtype=torch.float64)
    told: list[tuple[int, int]] = []
    found = sample_flow_map(
        diffusion,
        perfect_flow_map(diffusion),
        noise,
        levels=levels(diffusion, 24, steps),
        progress=lambda done, total: told.append((done, total)),
    )
    torch.testing.assert_close(found, exact_end(diffusion, noise), rtol=1e-6, atol=1e-6)
    assert told == [(done, steps) for done in range(1, steps + 1)]


@everywhere
def test_a_network_that_does_not_know_r_takes_eulers_steps(name):
    diffusion, noise = make_diffusion(name), torch.randn(SHAPE)
    network = perfect_network(diffusion)
    found = sample_flow_map(diffusion, lambda t, r: network, noise, levels=diffusion.schedule(5).tolist())
    torch.testing.assert_close(found, sample(diffusion, network, noise, steps=5, sampler="euler"))


@everywhere
def test_noise_that_is_added_on_the_way_leaves_the_distribution_as_it_is(name):
    diffusion = make_diffusion(name)
    t, higher = inner(diffusion, 0.6), inner(diffusion, 0.3)
    shape = (1, 1, 200_000)
    x0, noise = batch(*shape, dtype=torch.float64)
    raised = renoised(
        diffusion,
        diffusion.corrupt(x0, noise, at(t)[:1]),
        torch.randn(shape, dtype=torch.float64),
        t_B=at(t)[:1],
        higher_B=at(higher)[:1],
    )
    alpha, sigma = diffusion.coefficients(at(higher)[:1])
    assert raised.mean().item() == pytest.approx((alpha * MEAN).item(), abs=0.02 * raised.std().item())
    assert raised.std().item() == pytest.approx((alpha**2 * STD**2 + sigma**2).sqrt().item(), rel=0.01)


def test_renoising_goes_at_most_to_the_first_level_and_is_drawn_from_the_generator():
    diffusion, noise = make_diffusion("flow_matching"), torch.randn(SHAPE)

    def found(renoise: list[float], seed: int = 0) -> Tensor:
        return sample_flow_map(
            diffusion,
            perfect_flow_map(diffusion),
            noise,
            levels=[1.0, 0.5, 0.0],
            renoise=renoise,
            generator=torch.Generator().manual_seed(seed),
        )

    plain = sample_flow_map(diffusion, perfect_flow_map(diffusion), noise, levels=[1.0, 0.5, 0.0])
    assert torch.equal(found([0.5, 0.0]), plain)  # there is no level above the first
    assert torch.equal(found([0.0, 0.5]), found([0.0, 0.5]))
    assert not torch.allclose(found([0.0, 0.5]), plain)
    assert not torch.allclose(found([0.0, 0.5]), found([0.0, 0.5], seed=1))


def test_few_levels_are_some_of_many():
    assert places(12, 4) == [0, 3, 6, 9, 12]
    assert places(16, 3) == [0, 5, 11, 16]
    diffusion = make_diffusion("edm")
    assert levels(diffusion, 12, 2) == [diffusion.schedule(12)[place].item() for place in (0, 6, 12)]


@everywhere
def test_angles_go_from_data_to_noise(name):
    diffusion = make_diffusion(name)
    found = angle(diffusion, diffusion.schedule(12))
    assert (found.diff() < 0).all()
    assert found[-1] == 0
    assert 0.98 < found[0] <= 1


def test_a_fresh_second_time_shifts_nothing_and_a_trained_one_tells_steps_apart():
    second_time = SecondTime(16)
    assert (second_time(torch.tensor([1.0]), torch.tensor([0.0])) == 0).all()
    torch.nn.init.normal_(second_time.out.weight)
    rows = second_time(torch.tensor([1.0, 1.0, 0.5]), torch.tensor([0.0, 0.5, 0.0]))
    assert torch.pdist(rows).min() > 0.1
