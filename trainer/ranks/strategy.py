"""How ranks share the trained weights: one small interface, and DDP, the plain case of it.

A strategy holds one module of which some parameters are trained. What differs between strategies is where those lie:
this rank's part of each, with its Adam moments, is told as flat ranges in float32, under plain names. Checkpoints and
the moving average know nothing else of a strategy.

A step is: `forward` and `backward` for each micro batch, then `step`, which clips by the global norm and asks whether
the step is to be taken. The learning rate is given anew each time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.inputs import Inputs
from trainer.losses import Losses
from trainer.ranks.flat_ranges import FlatRange, whole_ranges
from trainer.recipes.schema import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Accept = Callable[[float], bool]
"""Whether to take a step with this gradient norm; called once a step, on every rank with the same number."""


@dataclass(frozen=True)
class Held:
    """What this rank holds of one trained parameter: its value and moments, float32, views of the real ones."""

    value: FlatRange
    moments: dict[str, FlatRange]


class Computed(nn.Module):
    """A stage's module in its precision. It returns the losses as a dict and a tensor: wrappers look for tensors in
    dicts and tuples, and find none in a class of ours."""

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.device_type, self.dtype = module, device.type, dtype

    def autocast(self) -> AbstractContextManager[None]:
        """Where matrix products are computed in the lower precision."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def forward(self, inputs: Inputs) -> tuple[dict[str, Tensor], Tensor]:
        """The fields of the module's `Losses`, the terms in float32."""
        with self.autocast():
            losses: Losses = self.module(inputs)
        return {name: value.float() for name, value in losses.terms.items()}, losses.quantiles


class Strategy(ABC):
    """One module, trained by all ranks together."""

    copies = 1
    """How many ranks hold the very same ranges; this one is number `copy` of them."""
    copy = 0
    scale = 1.0
    """By how much the loss is scaled before the backward pass, for fp16; gradients come out unscaled."""

    def __init__(self, computed: Computed, settings: TrainConfig) -> None:
        self.computed, self.settings = computed, settings
        self.wrapped: Callable[[Inputs], tuple[dict[str, Tensor], Tensor]] = computed
        """The module as it is called in training: with what this strategy put around it."""
        parameters = dict(computed.module.named_parameters())
        self.names = [name for name, value in parameters.items() if value.requires_grad]
        self.numel = sum(value.numel() for value in parameters.values())
        self.numel_learned = sum(parameters[name].numel() for name in self.names)

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The trained parameters as they lie in the module now."""
        here = dict(self.computed.module.named_parameters())
        return {name: here[name] for name in self.names}

    def forward(self, inputs: Inputs) -> Losses:
        """The losses of this rank's micro batch, which is on this rank's device."""
        return Losses(*self.wrapped(inputs))

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Gradients of a loss that is the mean over this rank's part of the batch; `last` ends a step's parts."""

    @abstractmethod
    def step(self, lr: float, accept: Accept) -> float:
        """Clip, take the step if it is accepted, forget the gradients; returns the global norm before clipping."""

    @abstractmethod
    def held(self) -> dict[str, Held]:
        """This rank's part of every trained parameter, empty where it has none. To be asked for anew at each use."""

    def refresh(self) -> None:  # noqa: B027
        """After `held` was written to: the weights that are computed with follow."""

    @abstractmethod
    def set_steps(self, steps: int) -> None:
        """Steps taken so far, for Adam's bias correction."""

    def close(self) -> None:  # noqa: B027
        """Let go of all memory: a process may train several stages."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """In it, all ranks may call parts of the module, the same ones in the same order; there are no gradients."""
        self.computed.eval()
        try:
            with torch.no_grad(), self.computed.autocast(), self._gathered():
                yield
        finally:
            self.computed.train()

    def _gathered(self) -> AbstractContextManager[None]:
        """In it, weights that belong to no part that is called by itself are whole."""
        return nullcontext()

    def reducing(self, *, last: bool) -> AbstractContextManager[None]:
        """Around a micro batch's forward and backward pass."""
        return nullcontext()


class TorchStrategy(Strategy):
    """What DDP and FSDP2 share: the module's own parameters are the masters, and torch's AdamW steps them."""

    optimizer: torch.optim.AdamW

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Strategy`."""
        (loss * self.scale).backward()

    def step(self, lr: float, accept: Accept) -> float:
        """See `Strategy`."""
        learned = (value for group in self.optimizer.param_groups for value in group["params"])
        parameters = [value for value in learned if value.grad is not None]
        gradients = [value.grad for value in parameters if value.grad is not None]
        if self.scale != 1:
            torch._foreach_mul_(gradients, 1 / self.scale)
        norm = self._whole(torch.nn.utils.get_total_norm(gradients))
        value = float(norm)
        if accept(value):
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def _whole(self, norm: Tensor) -> Tensor:
        return norm

    def set_steps(self, steps: int) -> None:
        """See `Strategy`."""
        for state in self.optimizer.state.values():
            state["step"].fill_(steps)

    def _begin(self) -> None:
        self.optimizer = make_optimizer(self.learned, self.settings)
        fill_state(self.optimizer, self.learned.values())


class Replicated(TorchStrategy):
    """DDP: every rank holds all, and gradients are averaged in the backward pass of a step's last micro batch."""

    def __init__(self, computed: Computed, settings: TrainConfig, *, rank: int, world_size: int) -> None:
        super().__init__(computed, settings)
        self.copy, self.copies = rank, world_size
        if world_size > 1:
            device = next(computed.parameters()).device
            # no sync at the start: the loop made the trained weights alike and the base is every rank's own copy of one
            # file; DDP would send it around in one more copy
            devices = [device] if device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(
                computed, device_ids=devices, forward_sync_buffers=False, init_sync=False
            )
        self._begin()

    def reducing(self, *, last: bool) -> AbstractContextManager[None]:
        """See `Strategy`."""
        if last or not isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def held(self) -> dict[str, Held]:
        """See `Strategy`."""
        learned = self.learned
        values = whole_ranges({name: value.data for name, value in learned.items()})
        moments = {
            kind: whole_ranges({name: self.optimizer.state[value][kind] for name, value in learned.items()})
            for kind in MOMENTS
        }
        return {name: Held(values[name], {kind: moments[kind][name] for kind in MOMENTS}) for name in learned}


def make_optimizer(
    learned: dict[str, nn.Parameter], settings: TrainConfig, kind: type[torch.optim.AdamW] = torch.optim.AdamW
) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices alone."""
    matrices = [value for value in learned.values() if value.ndim > 1]
    vectors = [value for value in learned.values() if value.ndim <= 1]
    groups = [(matrices, settings.weight_decay), (vectors, 0.0)]
    return kind(
        [{"params": params, "weight_decay": decay} for params, decay in groups if params],
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        fused=True,
    )


def fill_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Make Adam's state before the first step, so that a checkpoint has where to load to."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The Transformer blocks in a module: what is checkpointed, compiled and sharded one by one."""
    return [
        block
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and name.rpartition(".")[2] == "blocks"
        for block in part
    ]


def recompute(block: nn.Module) -> None:
    """Keep a block's inputs alone, and compute its activations again in the backward pass."""
    plain = block.forward
    block.forward = lambda *inputs: checkpoint(plain, *inputs, use_reentrant=False)  # type: ignore[method-assign]
