"""Measures the activation memory of one micro batch by running forward and backward pass on fake tensors.

The stage's own module runs with autocast and activation checkpointing as in training. A fake tensor has a shape, a
dtype and a storage size but no memory, and autograd saves it like a real tensor. Live bytes are summed over storages,
so that views count once and freed storages no longer count.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.fused.use import standing_in
from models.sizes import DecoderConfig, block_counts, with_blocks
from trainer.data.text_embeddings import TextReader
from trainer.inputs import Inputs
from trainer.losses import Losses
from trainer.memory.outline import outlined_task
from trainer.ranks.strategy import DTYPES, PrecisionModule, blocks_of, recompute
from trainer.recipes.schema import Config

Kind = tuple[tuple[int, ...], torch.dtype]
"""The shape and the dtype of a tensor."""


@dataclass(frozen=True)
class Activations:
    """Activation bytes of one micro batch, without weights and their gradients."""

    saved: int
    """Bytes held between forward and backward pass."""
    forward: int
    """The peak of the forward pass."""
    backward: int
    """The peak of the backward pass."""
    kinds: Counter[Kind]
    """The number of saved tensors of each kind."""

    @property
    def peak(self) -> int:
        """The peak of both passes."""
        return max(self.forward, self.backward)

    def largest(self, most: int = 4) -> list[tuple[int, Kind, int]]:
        """Return the largest groups of saved tensors: their number, their kind, and their total bytes."""
        groups = [(count, kind, count * _bytes(kind)) for kind, count in self.kinds.items()]
        return sorted(groups, key=lambda group: group[2], reverse=True)[:most]


@dataclass(frozen=True)
class Pass:
    """The settings with which a micro batch is computed."""

    clips: int
    frames: int
    precision: str
    """`fp32`, `bf16` or `fp16`."""
    lower_trained: bool
    """Whether trained weights are stored in that precision, as in ZeRO and FSDP2; DDP casts float32 weights."""
    recomputed: bool
    """Whether blocks are checkpointed, and so recomputed in the backward pass."""
    cuda: bool
    """Whether to follow CUDA's autocast, which keeps more operations in float32 than the CPU's."""
    text: bool = False
    """Whether D is conditioned on text."""
    kernels: bool = False
    """Whether kernels compute norms and heads (`models.fused`): on CUDA, where blocks are not compiled, except under
    ZeRO-3. Compiled blocks are planned as if torch's own operations computed them."""


def activations(config: Config, stage: str, dit: DecoderConfig, how: Pass) -> Activations:
    """Measure a micro batch with D of these sizes.

    A deep D is measured with two and three blocks of each kind and extrapolated, because each further block adds the
    same amount.
    """
    multi, single = block_counts(dit)
    few = (min(multi, 2), min(single, 2))
    more = [(index, count - few[index]) for index, count in enumerate((multi, single)) if count > few[index]]
    if sum(count for _, count in more) <= 2:
        return _of_depth(config, stage, dit, how, (multi, single))
    base = result = _of_depth(config, stage, dit, how, few)
    for index, count in more:
        deeper = _of_depth(config, stage, dit, how, (few[0] + (index == 0), few[1] + (index == 1)), backward=False)
        result = _extended(result, base, deeper, count)
    return result


def _extended(result: Activations, base: Activations, deeper: Activations, blocks: int) -> Activations:
    """Extrapolate `result` by `blocks` blocks, each of which adds the difference of `deeper` and `base`."""
    kinds = Counter(result.kinds)
    for kind in {*base.kinds, *deeper.kinds}:
        kinds[kind] += blocks * (deeper.kinds[kind] - base.kinds[kind])
    more = blocks * (deeper.saved - base.saved)
    return Activations(
        saved=result.saved + more,
        forward=result.forward + blocks * (deeper.forward - base.forward),
        backward=result.backward + more,
        kinds=+kinds,
    )


def _of_depth(
    config: Config, stage: str, dit: DecoderConfig, how: Pass, blocks: tuple[int, int], *, backward: bool = True
) -> Activations:
    task = outlined_task(config, stage, with_blocks(dit, blocks))
    module, dtype = task.module, DTYPES[how.precision]
    with FakeTensorMode():
        give_storage(module, dtype, lower_trained=how.lower_trained)
        for block in blocks_of(module):
            if how.cuda:
                as_on_cuda(block)
            if how.recomputed:
                recompute(block)
        computed = PrecisionModule(module, torch.device("cpu"), dtype)
        if how.cuda:
            as_on_cuda(computed)
            if not how.lower_trained:
                computed.cast_together()
        readers = [reader for reader in task.conditions() if how.text or not isinstance(reader, TextReader)]
        conditions = {name: value for reader in readers for name, value in reader.blank(how.clips).items()}
        with standing_in(lambda *_: None) if how.kernels else nullcontext():
            return measure(computed, (how.clips, dit.channels, how.frames), conditions, backward=backward)


def measure(
    computed: PrecisionModule,
    shape: Sequence[int],
    conditions: Mapping[str, Tensor] | None = None,
    *,
    backward: bool = True,
) -> Activations:
    """Measure a pass on x0 of shape (B, C, T), optionally forward only; in a FakeTensorMode all tensors are fake."""
    with _Living([*computed.parameters(), *computed.buffers()]) as living:
        x0_BCT = torch.zeros(*shape, dtype=torch.float16).float()
        inputs = Inputs(x0=x0_BCT, positions=torch.arange(shape[0]), conditions=conditions or {})
        loss = Losses(*computed(inputs)).total({}).mean()
        saved, forward, kinds = living.now, living.peak, living.kinds()
        living.peak = living.now
        if backward:
            loss.backward()
        return Activations(saved, forward, living.peak, kinds)


class _Living(TorchDispatchMode):
    """Tracks the bytes of live storages, except those of a model's parameters and buffers, and of gradients."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held = list(held)
        self._known = {value.untyped_storage()._cdata for value in self._held}
        self._living: dict[int, tuple[int, Kind]] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._hooks = [
            value.register_post_accumulate_grad_hook(self._forget_gradient)
            for value in self._held
            if value.requires_grad
        ]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()
        for value in self._held:
            value.grad = None

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def kinds(self) -> Counter[Kind]:
        """Return the number of live tensors of each kind."""
        return Counter(kind for _, kind in self._living.values())

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._living:
            return
        self._living[key] = storage.nbytes(), (tuple(tensor.shape), tensor.dtype)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        size, _ = self._living.pop(key, (0, None))
        self._watched.pop(key, None)
        self.now -= size

    def _forget_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._forget(parameter.grad.untyped_storage()._cdata)


class _CudaAutocast(TorchFunctionMode):
    """Runs norms in float32 under autocast, as CUDA does; the CPU's autocast keeps the dtype of the input."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function in (F.layer_norm, F.rms_norm, torch.rms_norm) and torch.is_autocast_enabled("cpu"):
            arguments = [value.float() if isinstance(value, Tensor) else value for value in arguments]
            options = {
                name: value.float() if isinstance(value, Tensor) else value for name, value in (options or {}).items()
            }
        return function(*arguments, **(options or {}))


def as_on_cuda(module: nn.Module) -> None:
    """Wrap a module's forward in `_CudaAutocast`; a mode around the whole pass would not cover recomputed blocks."""
    plain = module.forward

    def forward(*inputs: Any) -> Any:
        with _CudaAutocast():
            return plain(*inputs)

    module.forward = forward  # type: ignore[method-assign]


def give_storage(module: nn.Module, dtype: torch.dtype, *, lower_trained: bool) -> None:
    """Replace meta parameters and buffers by fake CPU ones, because autocast does not support the meta device."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            lower = lower_trained or not value.requires_grad
            fake = torch.empty(value.shape, dtype=dtype if lower else torch.float32)
            setattr(part, name, nn.Parameter(fake, requires_grad=value.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _bytes(kind: Kind) -> int:
    shape, dtype = kind
    return torch.Size(shape).numel() * dtype.itemsize
