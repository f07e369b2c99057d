"""How ranks share the trained weights: the `Strategy` interface, and DDP as its simplest implementation.

A strategy holds one module, some of whose parameters are trained. Strategies differ in which rank holds which part of
those parameters. `Strategy.held` describes this rank's part of each parameter and its Adam moments as flat ranges in
float32, under plain names; checkpoints and moving averages use nothing else of a strategy.

A step calls `forward` and `backward` for each micro batch, then `step`, which clips by the global norm. The caller
passes the learning rate and a `Gate`, which decides whether the step is taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.utils.checkpoint import checkpoint

from models.fp8_linear import FP8Linear
from trainer.inputs import Inputs
from trainer.losses import Losses
from trainer.ranks.casts import Casts, groups_of
from trainer.ranks.flat_ranges import FlatRange, whole_ranges
from trainer.ranks.gate import Gate
from trainer.recipes.schema import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainedRange:
    """This rank's part of one trained parameter and of its Adam moments, as float32 views of the tensors in use."""

    value: FlatRange
    moments: dict[str, FlatRange]


class PrecisionModule(nn.Module):
    """A stage's module, run in the recipe's precision.

    It returns the losses as a dict and a tensor, because DDP and FSDP find tensors in dicts and tuples, but not in
    `Losses`.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, dtype: torch.dtype, *, keeps_casts: bool = True
    ) -> None:
        """`keeps_casts`: whether a weight that a pass uses twice is cast once, which torch forbids in CUDA graphs."""
        super().__init__()
        self.module, self.device_type, self.dtype, self.keeps_casts = module, device.type, dtype, keeps_casts
        self._casts: Casts | None = None

    def cast_together(self) -> None:
        """From now on, cast float32 weights at the start of each pass, and not where each is used (`Casts`).

        For strategies in which a parameter is the same object in every pass, and whole.
        """
        if self.dtype != torch.float32:
            self._casts = Casts(groups_of(self.module, blocks_of(self.module)), self.dtype)

    def autocast(self) -> AbstractContextManager[None]:
        """Compute matrix products in the lower precision, inside a `with`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype, cache_enabled=self.keeps_casts)

    def forward(self, inputs: Inputs) -> tuple[dict[str, Tensor], Tensor]:
        """Return the fields of the module's `Losses`, with the terms in float32."""
        with self.autocast(), self._casts.in_place_of_weights() if self._casts else nullcontext():
            losses: Losses = self.module(inputs)
        return {name: value.float() for name, value in losses.terms.items()}, losses.quantiles


class Strategy(ABC):
    """Trains one module on all ranks together."""

    copies = 1
    """How many ranks hold identical ranges."""
    copy = 0
    """This rank's index among the ranks that hold identical ranges."""
    waits_for_steps = False
    """Whether `step` makes the host wait until the device has computed the gradients."""
    scale = 1.0
    """Loss scale of the backward pass, for fp16. `step` unscales the gradients."""

    def __init__(self, computed: PrecisionModule, settings: TrainConfig) -> None:
        self.computed, self.settings = computed, settings
        self.wrapped: Callable[[Inputs], tuple[dict[str, Tensor], Tensor]] = computed
        """The module inside this strategy's wrapper, as training calls it."""
        parameters = dict(computed.module.named_parameters())
        self.names = [name for name, value in parameters.items() if value.requires_grad]
        in_fp8 = (layer.weight for layer in computed.modules() if isinstance(layer, FP8Linear))
        self.numel = sum(value.numel() for value in (*parameters.values(), *in_fp8))
        self.numel_learned = sum(parameters[name].numel() for name in self.names)

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The trained parameters. Wrapping may replace the module's parameters, so they are looked up each time."""
        parameters = dict(self.computed.module.named_parameters())
        return {name: parameters[name] for name in self.names}

    def forward(self, inputs: Inputs) -> Losses:
        """Compute the losses of this rank's micro batch, which must be on this rank's device."""
        return Losses(*self.wrapped(inputs))

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a micro batch.

        Args:
            loss: the micro batch's mean loss, divided by the number of micro batches per step.
            last: whether this is the last micro batch of the step.
        """

    @abstractmethod
    def step(self, lr: float, gate: Gate) -> Tensor:
        """Clip the gradients, step the optimizer if the gate lets the step pass, and clear the gradients.

        Returns:
            (): the global gradient norm before clipping, the same on every rank.
        """

    @abstractmethod
    def held(self) -> dict[str, TrainedRange]:
        """Return this rank's part of every trained parameter, possibly empty.

        Training may replace the tensors: call this method again for each use.
        """

    def refresh(self) -> None:  # noqa: B027
        """Update the weights that the model computes with, after the tensors of `held` were written to."""

    @abstractmethod
    def set_steps(self, steps: int) -> None:
        """Set the number of steps taken, which Adam's bias correction uses."""

    def close(self) -> None:  # noqa: B027
        """Free all memory, because a process may train several stages one after another."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Allow calls of the module's parts inside the `with`, without gradients.

        All ranks must call the same parts in the same order.
        """
        self.computed.eval()
        try:
            with torch.no_grad(), self.computed.autocast(), self._gathered():
                yield
        finally:
            self.computed.train()

    def _gathered(self) -> AbstractContextManager[None]:
        """Gather the weights that belong to no separately sharded part, for the length of the `with`."""
        return nullcontext()

    def reducing(self, *, last: bool) -> AbstractContextManager[None]:
        """Wrap a micro batch's forward and backward pass; gradients are reduced among ranks only if it is the last."""
        return nullcontext()


class TorchStrategy(Strategy):
    """The common part of DDP and FSDP2: torch's fused AdamW updates float32 weights in place."""

    optimizer: torch.optim.AdamW

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Strategy`."""
        (loss * self.scale).backward()

    def step(self, lr: float, gate: Gate) -> Tensor:
        """See `Strategy`."""
        self._finish_gradients()
        stepped = (value for group in self.optimizer.param_groups for value in group["params"])
        parameters = [value for value in stepped if value.grad is not None]
        gradients = [value.grad for value in parameters if value.grad is not None]
        if self.scale != 1:
            torch._foreach_mul_(gradients, 1 / self.scale)
        norm = self._norm_of_ranks(torch.nn.utils.get_total_norm(gradients))
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.found_inf = gate.closed(norm)  # type: ignore[attr-defined]
        self.optimizer.step()
        self._clear_gradients()
        return norm

    def _finish_gradients(self) -> None:
        """Complete the gradients of all micro batches."""

    def _clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _norm_of_ranks(self, norm: Tensor) -> Tensor:
        """Return the norm of all ranks' gradients, from that of this rank's."""
        return norm

    def set_steps(self, steps: int) -> None:
        """See `Strategy`."""
        for state in self.optimizer.state.values():
            state["step"].fill_(steps)

    def _begin(self, stepped: dict[str, Tensor]) -> None:
        """Make the optimizer of this rank's part of each trained parameter."""
        self.optimizer = make_optimizer(stepped, self.settings)
        fill_state(self.optimizer, stepped.values())


class Replicated(TorchStrategy):
    """DDP: every rank holds all weights; the backward pass of a step's last micro batch averages the gradients."""

    def __init__(
        self,
        computed: PrecisionModule,
        settings: TrainConfig,
        *,
        rank: int,
        world_size: int,
        exchanged_in: torch.dtype = torch.float32,
    ) -> None:
        """`exchanged_in`: the data type in which the ranks exchange gradients, float32 or bfloat16."""
        super().__init__(computed, settings)
        self.copy, self.copies = rank, world_size
        if computed.device_type != "cpu":  # a CPU launches no kernels, and casts a weight best where it is used
            computed.cast_together()
        if world_size > 1:
            self._distribute(exchanged_in)
        self._begin(dict(self.learned))

    def _distribute(self, exchanged_in: torch.dtype) -> None:
        """Let the ranks average their gradients during the backward pass."""
        device = next(self.computed.parameters()).device
        # init_sync=False: the trained weights are already equal on all ranks, and every rank loaded the base from
        # the same file. DDP would broadcast the base through one more copy of it.
        devices = [device] if device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(
            self.computed,
            device_ids=devices,
            forward_sync_buffers=False,
            init_sync=False,
            gradient_as_bucket_view=True,  # gradients and buckets share their memory, which saves a copy of them
        )
        if exchanged_in == torch.bfloat16:
            # Of hooks by this name, DDP takes torch's own on NCCL alone.
            wrapped.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
        self.wrapped = wrapped

    def reducing(self, *, last: bool) -> AbstractContextManager[None]:
        """See `Strategy`."""
        if last or not isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def held(self) -> dict[str, TrainedRange]:
        """See `Strategy`."""
        learned = self.learned
        values = whole_ranges({name: value.data for name, value in learned.items()})
        moments = {
            kind: whole_ranges({name: self.optimizer.state[value][kind] for name, value in learned.items()})
            for kind in MOMENTS
        }
        return {name: TrainedRange(values[name], {kind: moments[kind][name] for kind in MOMENTS}) for name in learned}


def make_optimizer(
    learned: Mapping[str, Tensor], settings: TrainConfig, kind: type[torch.optim.AdamW] = torch.optim.AdamW
) -> torch.optim.AdamW:
    """Create AdamW with weight decay on matrices only, not on vectors."""
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
    """Allocate Adam's state before the first step, so that a checkpoint can be loaded into it."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """List the Transformer blocks in a module. Each is checkpointed, compiled and sharded separately."""
    return [
        block
        for name, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and name.rpartition(".")[2] == "blocks"
        for block in part
    ]


def recompute(block: nn.Module) -> None:
    """Keep only a block's inputs, and recompute its activations in the backward pass (activation checkpointing)."""
    forward = block.forward
    block.forward = lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)  # type: ignore[method-assign]
