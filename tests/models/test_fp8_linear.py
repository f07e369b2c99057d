"""Frozen linear layers in FP8: how near their products are, their gradients, and which layers of a D become one."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
from torch import Tensor, nn

from models.dit import DiT
from models.fp8_linear import FP8, FP8Linear, dequantized, hold_in_fp8, multiplies_fp8, quantized
from models.lora import inject_lora
from models.lora_product import lora_linear
from models.sizes import DiTConfig

CPU = torch.device("cpu")
DIT = DiTConfig(channels=32, width=48, depth=2, multistream_depth=1, heads=2, hidden_width=96, text_width=24)
shapes = pytest.mark.parametrize(("rows", "inputs", "outputs"), [(33, 64, 48), (7, 1024, 160), (1, 16, 16)])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs).requires_grad_(False)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def test_each_row_is_scaled_to_the_largest_number_and_rounded_to_three_bits():
    value = torch.randn(40, 64) * torch.logspace(-6, 6, 40)[:, None]
    value[3] = 0
    q, scale = quantized(value)
    assert (q.dtype, scale.dtype, scale.shape) == (FP8, torch.float32, (40, 1))
    torch.testing.assert_close(scale[4:, 0], value[4:].abs().amax(1) / 448)
    assert q[4:].float().abs().amax(1).eq(448).all()
    assert q[3].float().eq(0).all()
    error = (dequantized(q, scale, torch.float32) - value).abs()
    assert (error <= (value.abs() / 16).maximum(scale * 2**-10) * (1 + 1e-5)).all()  # half a step, also below 2⁻⁶


def test_what_is_quantized_lies_row_by_row():
    """Products in FP8 take no other layout, and a view of x may have one."""
    value = torch.randn(64, 40).T
    q, scale = quantized(value)
    assert q.is_contiguous()
    assert torch.equal(scale, quantized(value.clone(memory_format=torch.contiguous_format))[1])


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(spoiled):
    x = torch.ones(2, 16)
    x[0, 3] = spoiled
    y = FP8Linear(linear(16, 16), CPU)(x)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()


@shapes
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_dequantized_numbers(rows, inputs, outputs, bias):
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    x = torch.randn(rows, inputs, dtype=torch.bfloat16)
    expected = dequantized(*quantized(x), torch.float32) @ dequantized(*quantized(layer.weight), torch.float32).T
    if bias:
        expected += layer.bias.bfloat16()
    torch.testing.assert_close(FP8Linear(layer, CPU)(x), expected.bfloat16(), rtol=2**-7, atol=1e-4)


@shapes
def test_a_product_is_four_percent_off_in_every_row_and_channel(rows, inputs, outputs):
    """Also where rows or channels differ by orders of magnitude, for which one scale for all would not do."""
    layer = linear(inputs, outputs)
    x = torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]
    layer.weight *= torch.logspace(-3, 3, outputs)[:, None]
    layer.bias.zero_()
    found, exact = FP8Linear(layer, CPU)(x), layer(x)
    assert 0.005 < relative(found, exact) < 0.06
    bound = 0.08 * x.norm(dim=1)[:, None] * layer.weight.norm(dim=1)  # the error beside the largest product possible
    assert ((found - exact).abs() < bound).all()


def test_the_gradient_goes_through_the_weights_in_the_gradients_own_dtype():
    layer = linear(64, 48)
    held = FP8Linear(layer, CPU)
    x = torch.randn(3, 5, 64, requires_grad=True)
    gradient = torch.randn(3, 5, 48)
    held(x).backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ dequantized(held.weight, held.scale, torch.float32))
    assert 0.01 < relative(x.grad, gradient @ layer.weight) < 0.03


def test_a_product_has_the_dtype_of_autocast_or_of_x():
    layer = FP8Linear(linear(32, 16), CPU)
    x = torch.randn(4, 6, 32)
    assert (layer(x).dtype, layer(x).shape) == (torch.float32, (4, 6, 16))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x.transpose(0, 1)).equal(layer(x).transpose(0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_weights_and_scales_keep_their_dtypes(convert):
    model = nn.Sequential(FP8Linear(linear(32, 16), CPU))
    before = model[0].scale.clone()
    convert(model)
    assert (model[0].weight.dtype, model[0].scale.dtype) == (FP8, torch.float32)
    assert torch.equal(model[0].scale, before)
    assert model.to("meta")[0].weight.is_meta


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_lora_beside_it_is_not_quantized(scale):
    held = FP8Linear(linear(64, 48), CPU)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    x = torch.randn(3, 5, 64, requires_grad=True)
    found = lora_linear(x, held, a, b, scale)
    assert found is not None
    expected = held(x) + scale * x @ a.T @ b.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradient = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, a, b), gradient) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def decoder(hidden_width: int = 96, *, lora: bool = True) -> DiT:
    dit = DiT(dataclasses.replace(DIT, hidden_width=hidden_width))
    dit.requires_grad_(False)
    if lora:
        inject_lora(dit, {"rank": 4, "alpha": 4.0})
    return dit


def names_in_fp8(dit: nn.Module) -> set[str]:
    return {name for name, module in dit.named_modules() if isinstance(module, FP8Linear)}


def test_the_layers_of_the_blocks_and_those_with_a_lora_are_converted():
    dit = decoder()
    of_blocks = {
        name
        for name, module in dit.blocks.named_modules(prefix="blocks")
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    held = hold_in_fp8(dit, CPU)
    assert names_in_fp8(dit) == of_blocks | {"output.base_layer"}
    assert (held.converted, held.left) == (len(of_blocks) + 1, 0)
    assert isinstance(dit.input, nn.Linear)
    assert all(value.requires_grad == (".lora_" in name) for name, value in dit.named_parameters())


def test_layers_of_other_widths_are_left_and_counted():
    dit = decoder(hidden_width=100)
    held = hold_in_fp8(dit, CPU)
    assert held.converted == len(names_in_fp8(dit)) > 0
    assert held.left > 0
    for name, module in dit.named_modules():
        if name in names_in_fp8(dit):
            assert module.in_features % 16 == module.out_features % 16 == 0
    dit(torch.randn(2, 32, 9), torch.tensor([0.1, 0.9]))


def test_trained_layers_are_not_touched():
    dit = decoder(lora=False).requires_grad_(True)
    assert hold_in_fp8(dit, CPU) == (0, 0)
    assert not names_in_fp8(dit)


def test_former_weights_are_given_up():
    dit = decoder()
    former = [weakref.ref(module.weight) for module in dit.blocks.modules() if hasattr(module, "base_layer")]
    assert former
    hold_in_fp8(dit, CPU)
    assert [one() for one in former] == [None] * len(former)
    kept = {value.dtype for name, value in dit.blocks.named_buffers()}
    assert kept == {FP8, torch.float32}


def test_a_decoder_computes_nearly_the_same():
    dit = decoder()
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 32, 18), torch.tensor([0.1, 0.9])
    with torch.no_grad():
        before = dit(x, t)
        hold_in_fp8(dit, CPU)
        assert 0.005 < relative(dit(x, t), before) < 0.1


@pytest.mark.parametrize(("capability", "able"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_gpus_from_ada_on_multiply_fp8(monkeypatch, capability, able):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert multiplies_fp8(torch.device("cuda")) == able
    assert multiplies_fp8(CPU)
