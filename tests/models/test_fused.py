"""Kernels for parts of the models: they compile for GPUs, and give the plain form's numbers; and when they are used."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.fused import heads, norm, use
from models.fused.heads import ProjectedTokens
from models.rotary import Rotary, rope_frequencies

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")
CPU = torch.device("cpu")
COMPILED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from models.fused import heads, kernels, norm

NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


def kind(value):
    return NAMES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"


def launch(name, programs, *arguments, num_warps=4, **constants):
    kernel = getattr(kernels, name)
    signature = dict(zip(kernel.arg_names, map(kind, arguments))) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    print(name, len(made.asm["cubin"]) > 0)


norm.launch = heads.launch = launch
for dtype in (torch.float32, torch.bfloat16):
    norm._trial(torch.device("cpu"), dtype, True)
    heads._trial(torch.device("cpu"), dtype, True)
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env=os.environ | environment, capture_output=True, text=True)


def test_kernels_give_the_plain_forms_numbers():
    pytest.importorskip("triton")
    done = run("-m", "pytest", "-p", "no:cacheprovider", str(INTERPRETED), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout


def test_kernels_compile_for_a_gpu(tmp_path):
    """With the compiler alone, as for an H100; no GPU is there to run them."""
    pytest.importorskip("triton")
    done = run("-c", COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    names = {"sum_norm", "sum_norm_backward", "turn_heads", "turn_heads_backward"}
    assert set(done.stdout.splitlines()) == {f"{name} True" for name in names}, done.stderr
    assert done.returncode == 0, done.stderr


def inputs(dtype: torch.dtype = torch.float32):
    x, y, weights = (torch.randn(2, length, 12 * parts) for length, parts in ((5, 1), (5, 1), (1, 3)))
    return x.to(dtype), y.to(dtype), *weights.to(dtype).chunk(3, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpus_take_the_plain_form_to_the_bit(dtype):
    """What a CPU learned and decoded before there were kernels stays as it is."""
    x, y, gate, shift, scale = inputs(dtype)
    total = x + gate * y
    of_x, of_total = (F.layer_norm(value, (12,), eps=1e-6) * (1 + scale) + shift for value in (x, total))
    affine = nn.LayerNorm(12, dtype=dtype)
    assert torch.equal(norm.modulated(x, shift, scale)[1], of_x)
    assert all(map(torch.equal, norm.sum_modulated(x, y, gate, shift, scale), (total, of_total)))
    assert torch.equal(norm.gated_sum(x, y, gate), total)
    assert all(map(torch.equal, norm.layer_normed(x, affine), (x, affine(x))))
    assert all(map(torch.equal, norm.sum_layer_normed(x, y, affine), (x + y, affine(x + y))))


def test_heads_of_one_stream_and_of_several_are_the_same_on_cpus():
    rotary = Rotary.at(torch.arange(8), rope_frequencies(6, base=100.0, turning=6, device=CPU))
    qkv = torch.randn(2, 8, 54)
    whole = heads.turned_heads([ProjectedTokens(qkv)], 3, rotary)
    parts = heads.turned_heads([ProjectedTokens(qkv[:, :5]), ProjectedTokens(qkv[:, 5:])], 3, rotary)
    assert all(map(torch.equal, whole, parts))


@pytest.fixture
def on_this_device(monkeypatch):
    """As if this CPU were a GPU on which Triton works."""
    monkeypatch.setattr(use, "_DEVICES", ("cpu",))
    monkeypatch.setattr(use, "_works", lambda trial, device: True)


def test_tensors_that_kernels_cannot_take_have_the_plain_form(on_this_device):
    x, *_ = inputs()
    cut = nn.Parameter(torch.ones(12))
    cut.ds_id = 0  # as DeepSpeed's ZeRO-3 marks a parameter whose numbers may be on other ranks
    assert use.applies(norm._trial, x)
    assert not use.applies(norm._trial, x, cut)
    assert not use.applies(norm._trial, x.double())
    assert not use.applies(norm._trial, x[:0])
    assert not use.applies(norm._trial, x, torch.zeros(3, dtype=torch.int64))


def test_weights_of_other_shapes_have_the_plain_form(on_this_device, monkeypatch):
    monkeypatch.setattr(norm, "launch", None)  # a launch would fail
    x, y, *_ = inputs()
    for shape in ((2, 5, 12), (1, 1, 12), (2, 1, 1)):
        shift = torch.randn(shape)
        assert torch.equal(norm.modulated(x, shift, shift)[1], F.layer_norm(x, (12,), eps=1e-6) * (1 + shift) + shift)
    assert norm.gated_sum(x, y[:, :1], torch.randn(2, 1, 12)).shape == x.shape


def test_compiled_code_takes_the_plain_form(on_this_device):
    x, y, gate, shift, scale = inputs()
    compiled = torch.compile(norm.sum_modulated, backend="eager", fullgraph=True)
    total = x + gate * y
    expected = F.layer_norm(total, (12,), eps=1e-6) * (1 + scale) + shift
    assert torch.equal(compiled(x, y, gate, shift, scale)[1], expected)


def require_refused(trial, caplog, words: str) -> None:
    with caplog.at_level(logging.WARNING):
        assert not use._works.__wrapped__(trial, CPU)
    assert words in caplog.text


def test_a_kernel_that_fails_is_not_used(caplog):
    def fails(device, dtype, fused):
        raise RuntimeError("Failed to find C compiler")

    require_refused(fails, caplog, "Failed to find C compiler")


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_kernel_that_gives_other_numbers_is_not_used(wrong, caplog):
    def other(device, dtype, fused):
        right = torch.ones(3, dtype=dtype)
        return right, right * (wrong if fused else 1), right

    require_refused(other, caplog, "other numbers")


def test_a_trial_that_comes_out_right_is_used(caplog):
    with caplog.at_level(logging.WARNING):
        assert use._works.__wrapped__(lambda device, dtype, fused: (torch.ones(3, dtype=dtype),), CPU)
    assert caplog.records == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_first_use_may_lie_in_a_pass_without_gradients(mode, caplog):
    def differentiates(device, dtype, fused):
        values = use.trial_numbers(7, device=device, dtype=dtype)
        return torch.autograd.grad(values.square().sum(), (values,))

    with mode(), caplog.at_level(logging.WARNING):
        assert use._works.__wrapped__(differentiates, CPU)
    assert caplog.records == []


def test_a_stand_in_is_told_what_would_run_and_is_gone_afterwards():
    names = []
    x, y, gate, shift, scale = (value.requires_grad_() for value in inputs())
    with use.standing_in(lambda name, arguments: names.append(name)):
        norm.sum_modulated(x, y, gate, shift, scale)[1].sum().backward()
    assert names == ["sum_norm", "sum_norm_backward"]
    assert not use.applies(norm._trial, x)
