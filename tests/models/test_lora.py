"""The variants of D's LoRA: where each starts, what it computes, and that PEFT reads what an export holds."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear

from models.autoencoder import SpectralAE
from models.backbones.pretrained import load_dit
from models.codec import SPresso
from models.dit import DiT
from models.lora import file_tensors, inject_lora, start_factors, start_from_base
from models.sizes import LORA_VARIANTS, CodecConfig
from models.weights import save_weights
from tests.models.test_codec import DIT, SHAPES, edit

RANK, ALPHA = 3, 4.0
X, T = torch.randn(2, 128, 27, generator=torch.Generator().manual_seed(3)), torch.tensor([0.2, 0.9])
variants = pytest.mark.parametrize("variant", LORA_VARIANTS)


def lora(variant: str) -> dict:
    return {"rank": RANK, "alpha": ALPHA} | ({} if variant == "plain" else {"variant": variant})


def base() -> DiT:
    torch.manual_seed(1)
    dit = DiT(DIT)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dit.requires_grad_(False)


def adapted(variant: str) -> DiT:
    dit = base()
    inject_lora(dit, lora(variant))
    start_from_base(dit)
    return dit


@pytest.fixture
def dit_file(tmp_path: Path) -> Path:
    save_weights(tmp_path / "dit.safetensors", base().state_dict(), dataclasses.asdict(DIT))
    return tmp_path / "dit.safetensors"


def codec(variant: str, dit: DiT) -> SPresso:
    config = CodecConfig(
        autoencoder={"kind": "spectral", "folder": None},
        latent_encoder=SHAPES,
        dit=DIT,
        diffusion={"name": "flow_matching", "options": {}},
        lora=lora(variant),
        window=63,
    )
    return SPresso(config, autoencoder=SpectralAE(), dit=dit)


@pytest.fixture
def exported(variant: str, dit_file: Path, tmp_path: Path) -> Path:
    """An export whose LoRA is away from its start."""
    made = codec(variant, load_dit(dit_file))
    start_from_base(made.dit)
    for parameter in made.adapter_parameters().values():
        parameter.data += 0.2 * torch.randn_like(parameter)
    made.save_pretrained(tmp_path / "export", base=dit_file, card="")
    return tmp_path / "export"


@variants
def test_nothing_changes_at_the_start_and_everything_learned_has_a_gradient_later(variant):
    dit = adapted(variant)
    torch.testing.assert_close(dit(X, T), base()(X, T), rtol=1e-4, atol=1e-5)
    learned = {name: value for name, value in dit.named_parameters() if value.requires_grad}
    assert all(".lora_" in name for name in learned)
    assert any("lora_magnitude_vector" in name for name in learned) == (variant == "dora")
    with torch.no_grad():
        for value in learned.values():
            value += 0.1 * torch.randn_like(value)
    dit(X, T).square().mean().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in learned.values())


@variants
def test_a_layer_computes_what_its_paper_says(variant):
    layer = adapted(variant).blocks[0].out
    weight = layer.get_base_layer().weight
    a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    a0, b0 = (layer.pissa_start.A, layer.pissa_start.B) if variant == "pissa" else (torch.zeros(1), torch.zeros(1))
    a += torch.randn_like(a)
    b += torch.randn_like(b)
    scale = ALPHA / math.sqrt(RANK) if variant == "rslora" else ALPHA / RANK
    changed = weight + scale * (b @ a - (b0 @ a0 if variant == "pissa" else 0))
    if variant == "dora":
        magnitude = layer.lora_magnitude_vector["default"].weight
        changed *= (magnitude / changed.norm(dim=1))[:, None]
    x = torch.randn(5, weight.shape[1])
    expected = torch.nn.functional.linear(x, changed, layer.get_base_layer().bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["plain", "rslora", "pissa"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fused_layer_computes_what_peft_does(variant, precision):
    """Every layer's output and gradients, in float32 to rounding; in bf16 as near to float32 as PEFT's own are."""

    def found(*, fused: bool, dtype: torch.dtype) -> list[torch.Tensor]:
        dit = adapted(variant)
        if not fused:
            for module in dit.modules():
                if isinstance(module, Linear):
                    module.__class__ = Linear
        torch.manual_seed(2)
        for value in dit.parameters():
            if value.requires_grad:
                torch.nn.init.normal_(value, std=0.1)
            else:
                value.data = value.data.to(dtype)
        x = X.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            dit(x, T).square().mean().backward()
        return [x.grad, *(value.grad for value in dit.parameters() if value.requires_grad)]

    exact = found(fused=False, dtype=torch.float32)
    if precision == "fp32":
        for ours, theirs in zip(found(fused=True, dtype=torch.float32), exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
        return
    both = zip(*(found(fused=fused, dtype=torch.bfloat16) for fused in (True, False)), exact, strict=True)
    errors = [[(one - right).norm() / right.norm() for one in (ours, theirs)] for ours, theirs, right in both]
    ours, theirs = torch.tensor(errors).mean(0)
    assert ours < 1.1 * theirs < 0.1


def test_a_fused_layer_keeps_its_input_and_the_narrow_product_alone():
    layer = next(module for module in adapted("plain").modules() if isinstance(module, Linear))
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    kept: list[torch.Size] = []
    weights = {value.untyped_storage().data_ptr() for value in layer.parameters()}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in weights:
            kept.append(value.shape)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        layer(x)
    assert sorted(kept) == sorted([torch.Size([10, layer.in_features]), torch.Size([10, RANK])])


def test_pissa_starts_from_the_largest_singular_vectors_and_keeps_the_base():
    dit = adapted("pissa")
    layer = dit.blocks[0].out
    weight = layer.get_base_layer().weight
    assert torch.equal(weight, base().blocks[0].out.weight)
    product = ALPHA / RANK * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    u, s, v = torch.linalg.svd(weight)
    torch.testing.assert_close(product, u[:, :RANK] @ torch.diag(s[:RANK]) @ v[:RANK], rtol=1e-3, atol=1e-5)
    assert len(start_factors(dit)) == 2 * sum("lora_A" in name for name, _ in dit.named_parameters())


def test_pissa_learns_as_peft_s_own_does():
    """PEFT takes the start out of the base instead: outputs and gradients are equal at the start."""
    import peft

    ours, theirs = adapted("pissa"), base()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="pissa", target_modules=list(DiT.lora_targets))
    peft.inject_adapter_in_model(config, theirs)
    for dit in (ours, theirs):
        dit(X, T).square().mean().backward()
    for name, value in theirs.named_parameters():
        if value.requires_grad:
            grad = ours.get_parameter(name).grad
            torch.testing.assert_close(grad.abs(), value.grad.abs(), rtol=2e-2, atol=1e-4)  # a vector's sign is free


def test_the_fixed_factors_stay_float32_and_move():
    dit = adapted("pissa").bfloat16()
    assert {value.dtype for value in start_factors(dit).values()} == {torch.float32}
    assert dit.blocks[0].out.weight.dtype == torch.bfloat16
    assert all(value.is_meta for value in start_factors(dit.to("meta")).values())


@variants
def test_an_export_computes_the_same_here_and_in_peft(variant, exported, dit_file):
    ours = SPresso.from_pretrained(exported).dit
    theirs = PeftModel.from_pretrained(load_dit(dit_file), str(exported)).eval()
    torch.testing.assert_close(theirs(X, T), ours(X, T), rtol=1e-4, atol=1e-5)
    assert (base()(X, T) - ours(X, T)).abs().max() > 1e-2


@variants
def test_an_export_is_read_as_it_was_written(variant, exported, dit_file):
    loaded = SPresso.from_pretrained(exported)
    again = codec(variant, load_dit(dit_file))
    again.load_state_dict(loaded.state_dict())
    assert file_tensors(loaded.dit).keys() == file_tensors(again.dit).keys()
    assert all(torch.equal(file_tensors(loaded.dit)[name], value) for name, value in file_tensors(again.dit).items())
    described = json.loads((exported / "codec.json").read_text())["config"]["lora"]
    assert described == lora(variant)
    rank = json.loads((exported / "adapter_config.json").read_text())["r"]
    assert rank == (2 * RANK if variant == "pissa" else RANK)


@pytest.mark.parametrize("variant", ["plain"])
@pytest.mark.parametrize(("name", "told"), [("loha", "variant"), ("pissa", r"config\.lora\.rank` is not that")])
def test_another_variant_in_the_description_is_refused(variant, exported, name, told):
    edit(exported / "codec.json", variant_of_lora=name)
    with pytest.raises(ValueError, match=rf"codec\.json is damaged \(.*{told}"):
        SPresso.from_pretrained(exported)
