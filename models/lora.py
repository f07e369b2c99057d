"""D's low-rank adapters (LoRA) and their variants, by PEFT: injected into D, and as the tensors of PEFT's file.

A layer computes W x + s B A x. The variants, where r is the rank and α the recipe's `lora.alpha`:
    plain   s = α / r (arXiv 2106.09685)
    rslora  s = α / √r (arXiv 2312.03732)
    dora    each row of W + s B A is scaled to a trained norm (arXiv 2402.09353)
    pissa   A and B start from the r largest singular vectors of W (arXiv 2404.02948), with s = α / r

PEFT's PiSSA subtracts the initial product s B₀ A₀ from the base weights. Here the base and its hash do not change: each
layer keeps the fixed initial factors A₀ and B₀ beside the trained ones and computes W x + s (B A - B₀ A₀) x. PEFT's
file holds trained and fixed factors as one plain LoRA of rank 2r, which fits the unchanged base.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.decoder import Decoder
from models.float32_buffers import Float32Buffers
from models.lora_product import lora_linear

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
"""PEFT's name for the adapter that every codec's D has."""
DISTILLED = "distilled"
"""PEFT's name for the second adapter, with which D decodes in few steps; see `models.distilled`."""
_START = "pissa_start"


class StartFactors(Float32Buffers):
    """The fixed factors A₀ and B₀ of a layer's PiSSA: float32 in every precision, because training starts from them."""

    A: Tensor
    B: Tensor

    def __init__(self, a_RI: Tensor, b_OR: Tensor, *, scale: float) -> None:
        super().__init__()
        self.register_buffer("A", a_RI)
        self.register_buffer("B", b_OR)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return s B₀ A₀ x."""
        return functional.linear(functional.linear(x.to(self.A.dtype), self.A), self.B) * self.scale


def inject_lora(dit: Decoder, lora: Mapping[str, Any]) -> None:
    """Inject a LoRA into the layers `lora_targets` of D. Its start changes nothing that D computes.

    Args:
        dit: D, which is changed in place.
        lora: `rank`, `alpha` and, unless it is plain, `variant`.
    """
    from peft import inject_adapter_in_model  # imported here because peft takes longer to import than torch

    inject_adapter_in_model(_computed_config(lora, dit), dit, adapter_name=ADAPTER)
    if lora.get("variant") != "dora":
        for layer in _layers(dit):
            layer.__class__ = _fused_linear()
    if lora.get("variant") == "pissa":
        for layer in _layers(dit):
            a_RI, b_OR = _factors(layer)
            start = StartFactors(a_RI.detach().clone(), b_OR.detach().clone(), scale=layer.scaling[ADAPTER])
            layer.add_module(_START, start)
            layer.register_forward_hook(_without_start)


@torch.no_grad()
def add_distilled(dit: Decoder, lora: Mapping[str, Any]) -> None:
    """Add the adapter `DISTILLED` to a D that has `ADAPTER`, as a copy of it. `ADAPTER` stays in use."""
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(_computed_config(lora, dit), dit, adapter_name=DISTILLED)
    parameters = dict(dit.named_parameters())
    for name, value in parameters.items():
        if f".{DISTILLED}." in name:
            value.copy_(parameters[name.replace(f".{DISTILLED}.", f".{ADAPTER}.")])
    use(dit, ADAPTER)


@contextmanager
def using(dit: Decoder, adapter: str) -> Iterator[None]:
    """Have D compute with one of its adapters inside a `with`, and afterwards with the one in use before."""
    before = next(layer.active_adapters[0] for layer in _layers(dit))
    use(dit, adapter)
    try:
        yield
    finally:
        use(dit, before)


def use(dit: Decoder, adapter: str) -> None:
    """Have D compute with one of its adapters from now on. What is trained stays as it is."""
    for layer in _layers(dit):
        layer._active_adapter = adapter  # PEFT's own method would also change which adapter is trained


@torch.no_grad()
def start_from_base(dit: Decoder) -> None:
    """Set the factors of a PiSSA, fixed and trained, to √S of the largest singular values of the base's weights.

    Does nothing for other variants, or for a model on the meta device.
    """
    for layer in _layers(dit):
        start = getattr(layer, _START, None)
        if start is None or start.A.is_meta:
            continue
        u, s, v = torch.linalg.svd(layer.get_base_layer().weight.float(), full_matrices=False)
        rank = len(start.A)
        root_R = (s[:rank] / start.scale).sqrt()
        a_RI, b_OR = _factors(layer)
        for value, factors in ((root_R[:, None] * v[:rank], (start.A, a_RI)), (u[:, :rank] * root_R, (start.B, b_OR))):
            for factor in factors:
                factor.copy_(value)


def start_factors(dit: Decoder) -> dict[str, Tensor]:
    """Return the fixed factors of a PiSSA by their names in D; empty for other variants."""
    return {name: value for name, value in dit.named_buffers() if f".{_START}." in name}


def file_config(lora: Mapping[str, Any], dit: Decoder) -> LoraConfig:
    """Return PEFT's config of the LoRA that `file_tensors` returns."""
    factor = file_rank(lora) // lora["rank"]
    doubled = {"rank": factor * lora["rank"], "alpha": factor * lora["alpha"]}
    return _computed_config({**lora, **doubled}, dit)


def file_rank(lora: Mapping[str, Any]) -> int:
    """Return the rank of the LoRA that `file_tensors` returns."""
    return lora["rank"] * (2 if lora.get("variant") == "pissa" else 1)


def adapter_parameters(dit: Decoder, adapter: str = ADAPTER) -> dict[str, nn.Parameter]:
    """Return an adapter's trained parameters by their names in D."""
    return {name: value for name, value in dit.named_parameters() if f".{adapter}." in name}


def file_tensors(dit: Decoder, adapter: str = ADAPTER) -> dict[str, Tensor]:
    """Copy an adapter to host memory as PEFT's file holds it, by the names in that file; empty if D lacks it."""
    tensors = {
        _peft_name(name, adapter): value.detach().cpu().contiguous()
        for name, value in adapter_parameters(dit, adapter).items()
    }
    for name, start in start_factors(dit).items() if tensors else ():
        key = _file_name(name)
        joined = (tensors[key], start.cpu()) if name.endswith(".A") else (tensors[key], -start.cpu())
        tensors[key] = torch.cat(joined, dim=0 if name.endswith(".A") else 1)
    return tensors


@torch.no_grad()
def load_file_tensors(dit: Decoder, tensors: Mapping[str, Tensor], adapter: str = ADAPTER) -> None:
    """Load what `file_tensors` returned of an adapter."""
    starts = {_file_name(name): (name.endswith(".A"), start) for name, start in start_factors(dit).items()}
    for name, parameter in adapter_parameters(dit, adapter).items():
        in_file = _peft_name(name, adapter)
        value = tensors[in_file]
        if in_file in starts:
            is_a, start = starts[in_file]
            value, fixed = value.chunk(2, dim=0 if is_a else 1)
            start.copy_(fixed if is_a else -fixed)
        parameter.copy_(value)


def _computed_config(lora: Mapping[str, Any], dit: Decoder) -> LoraConfig:
    """Return PEFT's config of the trained factors. PEFT computes `pissa` as a plain LoRA."""
    from peft import LoraConfig

    variant = lora.get("variant")
    return LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        target_modules=list(dit.lora_targets),
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
    )


@functools.cache
def _fused_linear() -> type:
    """Return PEFT's linear layer, computed by `lora_linear` where that applies."""
    from peft.tuners.lora import Linear

    class FusedLinear(Linear):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or kwargs or self.disable_adapters or self.merged:
                return super().forward(x, *args, **kwargs)
            base: Any = self.get_base_layer()
            adapter = self.active_adapters[0]
            found = lora_linear(x, base, *_factors(self, adapter), self.scaling[adapter])
            return super().forward(x) if found is None else found

    return FusedLinear


def _layers(dit: Decoder) -> Iterator[Any]:
    from peft.tuners.lora import Linear

    return (module for module in dit.modules() if isinstance(module, Linear))


def _factors(layer: Any, adapter: str = ADAPTER) -> tuple[Tensor, Tensor]:
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _without_start(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return (output - getattr(layer, _START)(inputs[0])).to(output.dtype)


def _peft_name(name: str, adapter: str = ADAPTER) -> str:
    """Return the name that PEFT gives a LoRA weight in its file."""
    plain = name.replace(f".{adapter}.", ".")
    return "base_model.model." + plain.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def _file_name(start: str) -> str:
    """Return the name of the tensor in PEFT's file that holds a fixed factor and the trained one."""
    layer, _, factor = start.rpartition(f".{_START}.")
    return _peft_name(f"{layer}.lora_{factor}.{ADAPTER}.weight")
