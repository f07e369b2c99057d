from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.diffusion import (
    EDM,
    FORMULATIONS,
    Diffusion,
    FlowMatching,
    VarianceExploding,
    VPrediction,
    guided,
    make_diffusion,
)
from models.samplers import SAMPLERS, sample

MEAN, STD = 0.7, 0.5
"""Of the gaussian data for which the perfect denoiser and the exact path of the ODE are known."""

everywhere = pytest.mark.parametrize("name", FORMULATIONS)


def column(t: Tensor) -> Tensor:
    return t[:, None, None]


def perfect_network(diffusion: Diffusion):
    """What a network would learn from x0 ~ N(MEAN, STD²), found from the textbook posterior mean of x0."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (column(c) for c in diffusion.coefficients(t))
        return MEAN + STD**2 * alpha / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)

    if isinstance(diffusion, FlowMatching):
        return lambda x, t: (denoiser(x, t) - x) / column(t)

    assert isinstance(diffusion, VarianceExploding)
    predicts_v = isinstance(diffusion, VPrediction)

    def preconditioned(scaled: Tensor, c_noise: Tensor) -> Tensor:
        sigma = torch.tan(c_noise * math.pi / 2) if predicts_v else torch.exp(4 * c_noise)
        x = scaled / column(diffusion.c_in(sigma))
        return (denoiser(x, sigma) - column(diffusion.c_skip(sigma)) * x) / column(diffusion.c_out(sigma))

    return preconditioned


def exact_end(diffusion: Diffusion, noise: Tensor) -> Tensor:
    """Along the ODE a gaussian's quantile is kept: x_t = alpha · MEAN + sqrt(alpha² STD² + sigma²) · constant."""
    alpha, sigma = diffusion.coefficients(diffusion.schedule(1)[0])
    quantile = (diffusion.initial(noise) - alpha * MEAN) / torch.sqrt(alpha**2 * STD**2 + sigma**2)
    return MEAN + STD * quantile


def batch(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = MEAN + STD * torch.randn(shape, generator=generator, dtype=dtype)
    return x0, torch.randn(shape, generator=generator, dtype=dtype)


def sampling_error(diffusion: Diffusion, sampler: str, steps: int) -> float:
    noise = torch.linspace(-2, 2, 12, dtype=torch.float64).view(2, 2, 3)
    found = sample(diffusion, perfect_network(diffusion), noise, steps=steps, sampler=sampler)
    return float((found - exact_end(diffusion, noise)).abs().max())


# --- samplers ---------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpmpp", 2)])
def test_each_sampler_converges_to_the_exact_solution_at_its_order(name, sampler, order):
    # the last step from sigma_min to 0 does not shrink with the steps: make it nothing
    diffusion = FlowMatching() if name == "flow_matching" else make_diffusion(name, sigma_min=1e-5)
    coarse, fine = (sampling_error(diffusion, sampler, steps) for steps in (128, 1024))
    measured = math.log(coarse / fine) / math.log(1024 / 128)
    assert order - 0.25 < measured < order + 0.25
    assert fine < {1: 5e-3, 2: 5e-5}[order]


@everywhere
@pytest.mark.parametrize("steps", [8, 16, 32])
def test_the_second_order_samplers_are_worth_it_at_few_steps(name, steps):
    # at the v-prediction's own sigma_min, 0.3, the last step's error outweighs that of all others
    diffusion = make_diffusion(name, **({"sigma_min": 0.01} if name == "v_prediction" else {}))
    assert sampling_error(diffusion, "dpmpp", steps) < sampling_error(diffusion, "euler", steps) / 2
    assert sampling_error(diffusion, "heun", 2 * steps) < sampling_error(diffusion, "euler", 4 * steps)


@everywhere
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_samplers_are_finite_where_alpha_or_sigma_vanishes(name, sampler, steps):
    diffusion = make_diffusion(name)
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(sample(diffusion, perfect_network(diffusion), noise, steps=steps, sampler=sampler)).all()


@everywhere
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_denoiser_that_knows_the_clean_signal_is_followed_exactly(name, sampler):
    diffusion = make_diffusion(name)
    x0, noise = batch(2, 3, 4, dtype=torch.float64)

    class Told(type(diffusion)):
        def denoise(self, network, x_t, t):
            return x0

    found = sample(Told(), lambda x, t: x, noise, steps=5, sampler=sampler)
    torch.testing.assert_close(found, x0)


@everywhere
@pytest.mark.parametrize(("sampler", "calls"), [("euler", 6), ("heun", 11), ("dpmpp", 6)])
def test_calls_progress_and_gradients(name, sampler, calls):
    diffusion, seen, reports = make_diffusion(name), [], []
    perfect, weight = perfect_network(diffusion), torch.ones((), requires_grad=True)

    def network(x, t):
        seen.append(t)
        return weight * perfect(x, t)

    found = sample(
        diffusion, network, torch.randn(3, 2, 4), steps=6, sampler=sampler, progress=lambda *r: reports.append(r)
    )
    assert len(seen) == calls
    assert all(t.shape == (3,) and t.dtype == torch.float32 for t in seen)
    assert reports == [(done, 6) for done in range(1, 7)]
    assert not found.requires_grad


@everywhere
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_is_deterministic_and_leaves_the_noise_alone(name, sampler):
    diffusion, noise = make_diffusion(name), torch.randn(2, 3, 4)
    before = noise.clone()
    first, second = (sample(diffusion, perfect_network(diffusion), noise, steps=4, sampler=sampler) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(noise, before)


@everywhere
def test_a_half_precision_network_and_noise_are_sampled_in_float32(name):
    diffusion, noise = make_diffusion(name), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    perfect = perfect_network(diffusion)
    found = sample(diffusion, lambda x, t: perfect(x, t).bfloat16(), noise.bfloat16(), steps=8, sampler="dpmpp")
    exact = sample(diffusion, perfect, noise.bfloat16().float(), steps=8, sampler="dpmpp")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0)


def test_an_unknown_sampler_or_no_steps_are_refused():
    noise, network = torch.zeros(1, 1, 1), lambda x, t: x
    with pytest.raises(ValueError, match=r"'ddim'.*euler, heun, dpmpp"):
        sample(FlowMatching(), network, noise, steps=4, sampler="ddim")
    for name in FORMULATIONS:
        with pytest.raises(ValueError, match="at least 1 step"):
            sample(make_diffusion(name), network, noise, steps=0, sampler="euler")


# --- the interface, for both ------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_schedule_decreases_to_exactly_zero(name, steps):
    levels = make_diffusion(name).schedule(steps)
    assert levels.shape == (steps + 1,)
    assert (levels.diff() < 0).all()
    assert levels[-1] == 0


@everywhere
def test_sampling_starts_at_the_schedules_first_level(name):
    diffusion, noise = make_diffusion(name), torch.randn(1, 2, 3)
    first = diffusion.schedule(4)[:1].float()
    torch.testing.assert_close(diffusion.initial(noise), diffusion.corrupt(torch.zeros_like(noise), noise, first))


@everywhere
def test_noise_levels_are_the_distributions_quantiles(name):
    diffusion = make_diffusion(name)
    cdf = {
        "flow_matching": lambda t: torch.distributions.Normal(0, 1).cdf(torch.logit(t)),
        "edm": lambda t: torch.distributions.Normal(-0.5, 1.2).cdf(t.log()),
        "v_prediction": lambda t: t.atan() / math.atan(500),
    }[name]
    u = torch.linspace(0.001, 0.999, 999)
    t = diffusion.noise_level(u)
    assert (t.diff() > 0).all()
    torch.testing.assert_close(cdf(t), u)
    # so the level's bin is the bin of u, and all bins fill alike
    drawn = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    edges = diffusion.noise_level(torch.linspace(0, 1, 9)[1:-1])
    bins = torch.bucketize(diffusion.noise_level(drawn), edges)
    assert (torch.bincount(bins, minlength=8) / 100_000 - 1 / 8).abs().max() < 0.005
    assert (bins == (drawn * 8).long()).float().mean() > 0.9999


@everywhere
def test_noise_levels_are_finite_where_a_uniform_number_is_rounded_to_its_end(name):
    t = make_diffusion(name).noise_level(torch.tensor([0.0, 2**-24, 1 - 2**-24, 1.0]))
    assert torch.isfinite(t).all()
    assert (t > 0).all()


@everywhere
def test_corruption_is_what_the_coefficients_say(name):
    diffusion = make_diffusion(name)
    x0, noise = batch(3, 2, 5)
    t = torch.tensor([0.0, 0.3, 1.0])
    alpha, sigma = diffusion.coefficients(t)
    x_t = diffusion.corrupt(x0, noise, t)
    for i in range(3):
        torch.testing.assert_close(x_t[i], alpha[i] * x0[i] + sigma[i] * noise[i])
    assert torch.equal(x_t[0], x0[0])


@everywhere
def test_a_network_that_returns_the_target_denoises_perfectly_and_has_no_loss(name):
    diffusion = make_diffusion(name)
    x0, noise = batch(6, 2, 5, dtype=torch.float64)
    t = torch.tensor([0.0, 1e-3, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)

    def oracle(x: Tensor, level: Tensor) -> Tensor:
        return diffusion.target(x0, noise, t)

    torch.testing.assert_close(diffusion.denoise(oracle, diffusion.corrupt(x0, noise, t), t), x0)
    assert diffusion.loss(oracle, x0, noise, t).max() < 1e-12


@everywhere
def test_the_perfect_network_has_the_least_loss(name):
    diffusion, perfect = make_diffusion(name), perfect_network(make_diffusion(name))
    x0, noise = batch(4000, 2, 5)
    t = diffusion.noise_level((torch.arange(4000) + 0.5) / 4000)
    least = diffusion.loss(perfect, x0, noise, t).mean()
    for other in (lambda x, s: perfect(x, s) + 0.1, lambda x, s: perfect(x, s) * 1.1, lambda x, s: perfect(x, s) * 0.9):
        assert diffusion.loss(other, x0, noise, t).mean() > least + 1e-3


@everywhere
def test_everything_is_finite_at_both_ends(name):
    diffusion = make_diffusion(name)
    x0, noise = batch(3, 2, 5)
    t = torch.tensor([0.0, 1.0, float(diffusion.schedule(1)[0])])
    seen = []

    def network(x, level):
        seen.append(level)
        return x * column(level)

    assert torch.isfinite(diffusion.loss(network, x0, noise, t)).all()
    clean = diffusion.denoise(network, diffusion.corrupt(x0, noise, t), t)
    assert torch.isfinite(clean).all()
    assert torch.equal(clean[0], x0[0])  # without noise there is nothing to estimate
    assert all(torch.isfinite(level).all() for level in seen)


@everywhere
def test_the_loss_is_each_samples_own_mean_over_the_masked_frames(name):
    diffusion = make_diffusion(name)
    x0, noise = batch(3, 2, 5)
    t = torch.tensor([0.2, 0.5, 0.8])
    lengths = [5, 2, 0]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]

    def network(x, level):
        return torch.sin(x)

    masked = diffusion.loss(network, x0, noise, t, mask)
    assert torch.equal(masked, diffusion.loss(network, x0, noise, t, mask.float()))
    for i, length in enumerate(lengths[:2]):
        alone = slice(i, i + 1)
        cut = diffusion.loss(network, x0[alone, :, :length], noise[alone, :, :length], t[alone])
        torch.testing.assert_close(masked[alone], cut)
    assert masked[2] == 0
    spoiled = x0.masked_fill(~mask[:, None], 1e6)
    torch.testing.assert_close(diffusion.loss(network, spoiled, noise, t, mask), masked)
    torch.testing.assert_close(diffusion.loss(network, x0, noise, t)[0], masked[0])


@everywhere
def test_the_loss_is_float32_whatever_comes_in(name):
    diffusion, perfect = make_diffusion(name), perfect_network(make_diffusion(name))
    x0, noise = batch(3, 2, 500)
    t = torch.tensor([0.2, 0.5, 0.8])
    received = []

    def network(x, level):
        received.append((x.dtype, level.dtype))
        return perfect(x, level).bfloat16()

    loss = diffusion.loss(network, x0.half(), noise.double(), t.double())
    assert loss.dtype == torch.float32
    assert received == [(torch.float32, torch.float32)]
    torch.testing.assert_close(loss, diffusion.loss(perfect, x0, noise, t), rtol=0.01, atol=0)


# --- flow matching ----------------------------------------------------------------------------------------------------


def test_flow_matchings_network_is_given_x_t_and_t_and_predicts_the_velocity_towards_the_data():
    x0, noise = batch(2, 2, 5)
    t = torch.tensor([0.3, 0.6])
    flow, x_t = FlowMatching(), (1 - column(t)) * x0 + column(t) * noise

    def network(x, level):
        torch.testing.assert_close(x, x_t)
        assert torch.equal(level, t)
        return x**2

    torch.testing.assert_close(flow.loss(network, x0, noise, t), (x_t**2 - (x0 - noise)).square().mean(dim=(1, 2)))
    torch.testing.assert_close(flow.denoise(network, x_t, t), x_t + column(t) * x_t**2)


def test_the_logit_normal_can_be_moved_and_widened():
    u = torch.tensor([0.5, 0.8413447])
    torch.testing.assert_close(torch.logit(FlowMatching(1.0, 2.0).noise_level(u)), torch.tensor([1.0, 3.0]))


# --- EDM --------------------------------------------------------------------------------------------------------------

SIGMAS = torch.tensor([0.002, 0.1, 0.5, 1.0, 7.0, 80.0], dtype=torch.float64)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edms_preconditioning_keeps_the_variances_that_the_paper_asks_for(sigma_data):
    """Appendix B.6 of the paper."""
    edm = EDM(sigma_data=sigma_data)
    one, variance = torch.ones_like(SIGMAS), sigma_data**2 + SIGMAS**2
    torch.testing.assert_close(edm.c_in(SIGMAS) ** 2 * variance, one)
    torch.testing.assert_close(edm.c_noise(SIGMAS), SIGMAS.log() / 4)
    torch.testing.assert_close(edm.loss_weight(SIGMAS) * edm.c_out(SIGMAS) ** 2, one)
    # the target has unit variance, and the errors of the network are amplified least
    skip, out = edm.c_skip(SIGMAS), edm.c_out(SIGMAS)
    torch.testing.assert_close(((1 - skip) ** 2 * sigma_data**2 + skip**2 * SIGMAS**2) / out**2, one)
    torch.testing.assert_close(skip, sigma_data**2 / variance)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edms_loss_is_the_weighted_error_of_the_denoiser(sigma_data):
    edm, sigma = EDM(sigma_data=sigma_data), SIGMAS.float()
    x0, noise = batch(len(sigma), 2, 50)

    def network(x, c_noise):
        return torch.sin(3 * x) + column(c_noise)

    denoised = edm.denoise(network, edm.corrupt(x0.double(), noise.double(), SIGMAS), SIGMAS)
    expected = edm.loss_weight(SIGMAS) * (denoised - x0).square().mean(dim=(1, 2))
    torch.testing.assert_close(edm.loss(network, x0, noise, sigma), expected.float(), rtol=1e-4, atol=1e-6)


def test_edms_schedule_is_equation_5():
    edm = EDM(sigma_min=0.01, sigma_max=50.0, rho=5.0)
    levels = edm.schedule(9)
    assert levels[0].item() == pytest.approx(50)
    assert levels[-2].item() == pytest.approx(0.01)
    torch.testing.assert_close((levels[:-1] ** (1 / 5)).diff().std(), torch.zeros((), dtype=torch.float64))


# --- guidance and the registry ----------------------------------------------------------------------------------------


def test_a_guidance_of_1_never_calls_the_unconditional_network_and_0_is_that_network():
    def unconditional(x, t):
        raise AssertionError("called")

    x, t = torch.randn(1, 2, 3), torch.zeros(1)
    assert torch.equal(guided(lambda x, t: x * 2, unconditional, 1)(x, t), x * 2)
    torch.testing.assert_close(guided(lambda x, t: x * 2, lambda x, t: x * 3, 0.0)(x, t), x * 3)


@everywhere
def test_guiding_the_prediction_guides_the_denoiser(name):
    diffusion = make_diffusion(name)
    x, t = torch.randn(2, 2, 3), torch.tensor([0.3, 0.8])

    def conditional(x, t):
        return x.sin()

    def unconditional(x, t):
        return x.cos()

    networks = conditional, unconditional, guided(conditional, unconditional, 4.0)
    with_condition, without, both = (diffusion.denoise(network, x, t) for network in networks)
    torch.testing.assert_close(both, without + 4 * (with_condition - without))


def test_formulations_are_made_by_name():
    assert make_diffusion("flow_matching", logit_std=2.0) == FlowMatching(logit_std=2.0)
    assert make_diffusion("edm", sigma_max=20) == EDM(sigma_max=20)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vp", {}, "unknown diffusion 'vp': choose one of flow_matching, edm, v_prediction"),
        ("edm", {"sigma": 1}, "no option 'sigma': its options are sigma_data"),
        ("flow_matching", {"logit_std": 0}, "logit_std=0 must be above 0"),
        ("edm", {"sigma_data": -1}, "sigma_data=-1 must be above 0"),
        ("edm", {"log_std": math.nan}, "log_std=nan must be a finite number"),
        ("edm", {"log_mean": "low"}, "log_mean='low' must be a number"),
        ("edm", {"sigma_min": 90}, "sigma_max=80.0 must be above sigma_min=90"),
        ("v_prediction", {"sigma_min": 0}, "sigma_min=0 must be above 0"),
    ],
)
def test_a_wrong_name_or_option_is_refused_with_the_right_ones(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_diffusion(name, **options)


# --- v-prediction -----------------------------------------------------------------------------------------------------


def test_v_prediction_is_the_objective_on_a_cosine_path():
    x0, noise = batch(5, 2, 3, dtype=torch.float64)
    t = torch.tensor([0.01, 0.3, 0.5, 0.7, 0.99], dtype=torch.float64)
    alpha, sigma = column((t * math.pi / 2).cos()), column((t * math.pi / 2).sin())
    told: list[Tensor] = []

    def network(x: Tensor, level: Tensor) -> Tensor:
        told[:] = [x, level]
        return x.sin() + column(level)

    x_t = alpha * x0 + sigma * noise
    expected = (x_t.sin() + column(t) - (alpha * noise - sigma * x0)).square().mean((1, 2))
    losses = VPrediction().loss(network, x0, noise, torch.tan(t * math.pi / 2))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(told[0].double(), x_t, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told[1].double(), t, rtol=1e-4, atol=1e-6)
