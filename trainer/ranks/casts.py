"""Copies of float32 weights in the precision of the computation, which all are made at once.

Autocast casts each weight where a matrix product reads it, and each gradient on its way back: two kernels for each of
some two hundred small tensors. Here a few kernels cast all weights, and one the gradients of a block, so that ranks
exchange them during the backward pass as before. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.objectives import Denoiser, LatentDenoiser

Place = tuple[nn.Module, str]
"""A module, and the name of one of its own parameters."""


class Casts:
    """The weights of a module whose copies are made together, in groups."""

    def __init__(self, groups: Sequence[Sequence[Place]], dtype: torch.dtype) -> None:
        """The gradients of a group are cast together, when the backward pass has come to the last of them."""
        self.groups, self.dtype = groups, dtype

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Make copies, and have the module compute with them inside a `with`; gradients go to the weights.

        A block that the backward pass computes again finds its weights themselves, which autocast casts to the same
        numbers: until the optimizer's step they do not change.
        """
        places = [place for group in self.groups for place in group]
        weights = [getattr(owner, name) for owner, name in places]
        copies = iter(_copied(weights, self.dtype))
        try:
            for group in self.groups:
                own = [getattr(owner, name) for owner, name in group]
                made = _Cast.apply(tuple(islice(copies, len(group))), *own)
                for (owner, name), copy in zip(group, made, strict=True):
                    owner._parameters[name] = copy
            yield
        finally:
            for (owner, name), weight in zip(places, weights, strict=True):
                owner._parameters[name] = weight


def groups_of(module: nn.Module, blocks: Sequence[nn.Module]) -> list[list[Place]]:
    """Group the float32 weights that a stage's module uses in matrix products under autocast alone, block by block.

    These are the trained linear layers of g, of f, of D's blocks, and of D's LoRA. D's other layers are left out, as D
    reads the dtype of its computation from them; DoRA's factors, from which PEFT reads a dtype; and stages without a D,
    which turn autocast off in parts.
    """
    if not isinstance(module, Denoiser):
        return []
    wanted = {id(layer) for layer in _layers(module, blocks)}
    groups = [_places(layer for layer in block.modules() if id(layer) in wanted) for block in blocks]
    inside = {id(layer) for block in blocks for layer in block.modules()}
    outside = _places(layer for layer in module.modules() if id(layer) in wanted - inside)
    return [group for group in (*groups, outside) if group]


def _layers(module: Denoiser, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
    of_dit = {id(layer) for layer in module.dit.modules()}
    in_blocks = {id(layer) for block in blocks for layer in block.modules()}
    dora = any("lora_magnitude_vector" in name for name, _ in module.dit.named_parameters())
    parts = (module.dit, module.g, module.f) if isinstance(module, LatentDenoiser) else (module.dit,)
    for part in parts:
        for name, layer in part.named_modules():
            factor = "lora_A" in name or "lora_B" in name
            used = not dora if factor else id(layer) in in_blocks or id(layer) not in of_dit
            if used and isinstance(layer, nn.Linear):
                yield layer


def _places(layers: Iterable[nn.Module]) -> list[Place]:
    return [
        (layer, name)
        for layer in layers
        for name, weight in layer.named_parameters(recurse=False)
        if weight.requires_grad and weight.dtype == torch.float32
    ]


class _Cast(torch.autograd.Function):
    """Gives copies of weights a gradient: that of the weights, all of which one kernel casts."""

    @staticmethod
    def forward(ctx: Any, copies: tuple[Tensor, ...], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return copies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [gradient for gradient in gradients if gradient is not None]
        copies = iter(_copied(found, torch.float32))
        return None, *(None if gradient is None else next(copies) for gradient in gradients)


@torch.no_grad()
def _copied(values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(value, dtype=dtype) for value in values]
    if copies:
        torch._foreach_copy_(copies, values)
    return copies
