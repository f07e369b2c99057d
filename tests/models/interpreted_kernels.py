"""The kernels of `models.fused` against their plain forms, run by Triton's interpreter; see `test_fused.py`.

The interpreter is chosen by an environment variable when Triton is imported, hence in a process of its own.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from models.dit import DiT, HeadNorm
from models.fused import heads, norm, use
from models.latent_encoder import LatentEncoder, TransformerBlock, _rotary
from models.rotary import Rotary, rope_frequencies
from models.sizes import DiTConfig, LatentEncoderConfig
from trainer.ranks.strategy import recompute

SIZES = [((1, 1, 2), False), ((2, 5, 7), True), ((1, 16, 32), False), ((2, 18, 33), True)]
"""Samples, tokens and width, and whether they lie apart in memory: one of everything, as many tokens as a program sums
and more, a power of two and one more."""


@pytest.fixture(autouse=True)
def kernels_on_cpus(monkeypatch):
    monkeypatch.setattr(use, "_DEVICES", ("cpu",))
    torch.manual_seed(3)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that ran."""
    names, launch = [], use.launch

    def noted(name, *arguments, **constants):
        names.append(name)
        launch(name, *arguments, **constants)

    monkeypatch.setattr(norm, "launch", noted)
    monkeypatch.setattr(heads, "launch", noted)
    return names


def tokens(*shape: int, dtype: torch.dtype = torch.float32, strided: bool = False) -> Tensor:
    """Random tokens (B, S, D), on request every other one of a longer sequence, with the sample as second dimension."""
    if not strided:
        return torch.randn(shape, dtype=torch.float32).to(dtype).requires_grad_()
    batch, length, width = shape
    value = torch.randn(2 * length, batch, width + 3).to(dtype)
    return value[::2, :, 1:-2].transpose(0, 1).requires_grad_()


def weights(batch: int, width: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Parts (B, 1, D) of one tensor, as a modulation gives them."""
    return tuple(torch.randn(batch, 1, count * width).to(dtype).requires_grad_().chunk(count, -1))


def gradients(results, inputs):
    """Gradients of a sum in which each number has another weight; of none that has no gradient."""
    generator = torch.Generator().manual_seed(4)
    loss = sum((value.float() * torch.randn(value.shape, generator=generator)).sum() for value in results)
    return torch.autograd.grad(loss, [value for value in inputs if value.requires_grad])


def both(function, inputs, *, used=slice(None)):
    """Results and gradients of a function with kernels, and in its plain form."""
    found = []
    for applies in (use.applies, lambda *_: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(norm, "applies", applies)
            patch.setattr(heads, "applies", applies)
            results = function(*inputs)
            found.append([*results, *gradients(results[used], inputs)])
    return found


def require_close(fused, plain, *, within: float = 2e-5):
    for one, other in zip(fused, plain, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=within, atol=within * float(other.detach().abs().max()))


@pytest.mark.parametrize(("size", "strided"), SIZES)
def test_norms_equal_the_plain_form(size, strided, launched):
    batch, _, width = size
    x, y = tokens(*size, strided=strided), tokens(*size, strided=strided)
    gate, shift, scale = weights(batch, width, 3)
    affine = nn.LayerNorm(width)
    nn.init.normal_(affine.weight)
    nn.init.normal_(affine.bias)
    require_close(*both(norm.modulated, (x, shift, scale)))
    require_close(*both(norm.sum_modulated, (x, y, gate, shift, scale)))
    require_close(*both(lambda *given: (norm.gated_sum(*given),), (x, y, gate)))
    learned = (affine.weight, affine.bias)
    require_close(*both(lambda x, *_: norm.layer_normed(x, affine), (x, *learned)))
    require_close(*both(lambda x, y, *_: norm.sum_layer_normed(x, y, affine), (x, y, *learned)))
    assert launched.count("sum_norm") == launched.count("sum_norm_backward") >= 4


@pytest.mark.parametrize("used", [slice(0, 1), slice(1, 2)], ids=["only the sum is used", "only the norm is used"])
def test_a_result_without_a_gradient(used):
    x, y, (gate, shift, scale) = tokens(2, 5, 12), tokens(2, 5, 12), weights(2, 12, 3)
    with torch.no_grad():
        shift, scale = shift.clone(), scale.clone()  # a sum that is used alone gives them no gradient
    require_close(*both(norm.sum_modulated, (x, y, gate, shift, scale), used=used))


def test_frozen_weights_and_frozen_tokens_get_no_gradient(launched):
    x, y, (gate, shift, scale) = tokens(2, 5, 12), tokens(2, 5, 12), weights(2, 12, 3)
    frozen = [value.detach() for value in (gate, shift, scale)]
    require_close(*both(norm.sum_modulated, (x, y, *frozen)))
    require_close(*both(norm.sum_modulated, (x.detach(), y, gate, shift, scale)))
    require_close(*both(norm.sum_modulated, (x, y.detach(), gate, shift, scale)))
    require_close(*both(norm.modulated, (x.detach(), shift, scale)))
    assert "sum_norm_backward" in launched


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
def test_dtypes_under_autocast_are_those_of_the_plain_form(of_x):
    """The norm is in the dtype of the product that follows, which autocast would otherwise cast for it."""
    x, y, (gate, shift, scale) = tokens(2, 9, 24, dtype=of_x), tokens(2, 9, 24, dtype=torch.bfloat16), weights(2, 24, 3)
    affine = nn.LayerNorm(24)

    def gated(x, y, gate, shift, scale):
        total, out = norm.sum_modulated(x, y, gate, shift, scale)
        return total, out.bfloat16()

    def plain_sum(x, y):
        total, out = norm.sum_layer_normed(x, y, affine)
        return total, out.bfloat16()

    lower = [value.bfloat16() for value in (gate, shift, scale)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm.modulated(x, shift, scale)[1].dtype == torch.bfloat16
        require_close(*both(gated, (x, y, *lower)), within=2e-2)
        require_close(*both(plain_sum, (x, y)), within=2e-2)


def streams(lengths, *, batch=2, count=3, width=6, norms=True, dtype=torch.float32, strided=False):
    made = []
    for length in lengths:
        own = [HeadNorm(width, eps=1e-6) for _ in range(2)] if norms else [None, None]
        for each in filter(None, own):
            nn.init.normal_(each.weight)
        made.append(heads.ProjectedTokens(tokens(batch, length, 3 * count * width, dtype=dtype, strided=strided), *own))
    return made


def rotary_of(length: int, width: int) -> Rotary:
    frequencies = rope_frequencies(width, base=100.0, turning=width - 2, device=torch.device("cpu"))
    return Rotary.at(torch.arange(length) * 3 % 7, frequencies)


def inputs_of(given):
    learned = [each.weight for stream in given for each in (stream.norm_q, stream.norm_k) if each is not None]
    return [stream.qkv for stream in given], learned


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("lengths", "count", "width", "strided"),
    [((1,), 1, 2, False), ((7,), 3, 6, True), ((5, 3), 5, 10, True), ((4, 1, 2), 2, 8, False)],
)
def test_heads_equal_the_plain_form(lengths, count, width, norms, strided, launched):
    given = streams(lengths, count=count, width=width, norms=norms, strided=strided)
    projections, learned = inputs_of(given)
    rotary = rotary_of(sum(lengths), width)
    require_close(*both(lambda *_: heads.turned_heads(given, count, rotary), (*projections, *learned)))
    own = launched[-2 * len(lengths) :]  # before them may be those of the trial
    assert own == ["turn_heads"] * len(lengths) + ["turn_heads_backward"] * len(lengths)


def test_gradients_of_heads_may_lie_anywhere_in_memory():
    """As attention returns them, transposed, or expanded, or with the features apart."""
    given = streams((5, 3))
    (latent, text), rotary = inputs_of(given)[0], rotary_of(8, 6)

    def turned(*_):
        q, k, v = heads.turned_heads(given, 3, rotary)
        apart = k.transpose(2, 3).contiguous().transpose(2, 3)
        return q.transpose(1, 2), apart, v.sum((0, 3))

    require_close(*both(turned, (latent, text)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", [norm, heads])
def test_half_precision_is_off_by_its_rounding(part, dtype):
    """The interpreter cuts bits off where a GPU rounds, so that errors here are twice those of a GPU."""
    assert use.off_by(part._trial, torch.device("cpu"), dtype) < {torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]


def test_streams_of_two_dtypes_and_too_few_angles_take_the_plain_form(launched):
    first, second = streams((5, 3), norms=False)
    mixed = [first, heads.ProjectedTokens(second.qkv.bfloat16())]
    assert heads.turned_heads(mixed, 3, rotary_of(8, 6))[0].dtype == torch.float32
    with pytest.raises(RuntimeError, match="must match"):
        heads.turned_heads([first], 3, rotary_of(4, 6))
    assert launched == []


def noisy(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return module


def dit() -> DiT:
    sizes = {"channels": 4, "width": 16, "depth": 2, "multistream_depth": 1, "heads": 2, "hidden_width": 24}
    return noisy(DiT(DiTConfig(**sizes, text_width=8, text_tokens=3, memory_tokens=2)))


@pytest.mark.parametrize("lower", [False, True])
def test_a_whole_d_with_all_its_weights_trained(lower, launched):
    model, x, t = dit(), torch.randn(2, 4, 6), torch.rand(2)
    condition, text = torch.randn(2, 16, 6, requires_grad=True), torch.randn(2, 3, 8)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    inputs = [condition, *(value for name, value in model.named_parameters() if "logvar" not in name)]
    context = torch.autocast("cpu", dtype=torch.bfloat16) if lower else nullcontext()

    def forward(*_):
        with context:
            return (model(x, t, text=text, text_mask=mask, condition=condition),)

    fused, plain = both(forward, inputs)
    for one, other in zip(fused, plain, strict=True):
        off = float((one - other).norm() / other.norm()) if other.any() else float(one.norm())
        assert off < (1e-1 if lower else 1e-4)
    assert set(launched) == {"sum_norm", "sum_norm_backward", "turn_heads", "turn_heads_backward"}


def test_a_whole_g(launched):
    sizes = {"latent_channels": 4, "z_channels": 3, "width": 16, "heads": 2, "encoder_depth": 2, "upsampler_depth": 1}
    config = LatentEncoderConfig(**sizes, pooling=3, patch_size=1, start="random")
    model, x0 = noisy(LatentEncoder(config)), torch.randn(2, 4, 9)
    fused, plain = both(lambda *_: (model(x0),), list(model.parameters()))
    require_close(fused, plain, within=1e-4)
    assert launched


def test_the_first_use_may_lie_in_a_recomputed_block(launched):
    """The trial that the first use makes leaves no trace in what the second computation is compared with."""
    kept, recomputed = TransformerBlock(12, 2), TransformerBlock(12, 2)
    recomputed.load_state_dict(kept.state_dict())
    rotary = _rotary(LatentEncoderConfig(latent_channels=4, width=12, heads=2), torch.zeros(2, 5, 12))
    recompute(recomputed)
    x = torch.randn(2, 5, 12)
    results = []
    for block in (recomputed, kept):  # the recomputed one first: it is what makes the trial
        use._works.cache_clear()
        launched.clear()
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = block(given, rotary)
        out.float().square().sum().backward()
        results.append([out, given.grad, *(value.grad for value in block.parameters())])
    assert use._works.cache_info().misses == 2
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_pass_without_gradients_keeps_nothing(launched):
    model, x, t = dit(), torch.randn(1, 4, 4), torch.rand(1)
    with torch.no_grad():
        assert not model(x, t).requires_grad
    assert "turn_heads" in launched
    assert not any(name.endswith("backward") for name in launched)


def test_a_deep_copy_computes_the_same(launched):
    model, x, t = dit(), torch.randn(1, 4, 4), torch.rand(1)
    assert torch.equal(model(x, t), copy.deepcopy(model)(x, t))
