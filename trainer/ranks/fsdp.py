"""FSDP2: torch shards trained weights, gradients and moments among ranks, along each parameter's first dimension.

With `replicas` > 1 (HSDP), the ranks form `replicas` groups, each of which holds all weights; gradients are then also
averaged across the groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainer.ranks.flat_ranges import FlatRange
from trainer.ranks.gate import Gate
from trainer.ranks.strategy import MOMENTS, PrecisionModule, TorchStrategy, TrainedRange, blocks_of
from trainer.recipes.schema import TrainConfig


class Sharded(TorchStrategy):
    """Applies `fully_shard` to every Transformer block, and to the module with all other weights."""

    def __init__(
        self,
        computed: PrecisionModule,
        settings: TrainConfig,
        *,
        world_size: int,
        replicas: int,
        shard_base: bool,
        exchanged_in: torch.dtype = torch.float32,
    ) -> None:
        """`exchanged_in`: the data type in which the ranks exchange gradients, float32 or bfloat16."""
        super().__init__(computed, settings)
        mesh = _mesh(computed.device_type, world_size, replicas)
        self.copies, self.copy = replicas, mesh.get_local_rank("replicate") if replicas > 1 else 0
        # `fully_shard` moves a sharded base to the device block by block. No reference to its whole weights may be kept
        # here, or their memory would not be freed.
        unsharded = None if shard_base else {value for value in computed.parameters() if not value.requires_grad}
        precision = MixedPrecisionPolicy(
            param_dtype=None if computed.dtype == torch.float32 else computed.dtype,
            reduce_dtype=exchanged_in,
            cast_forward_inputs=False,
        )
        # A LoRA is small: it stays gathered between the forward and the backward pass, and is sent once.
        gathered_once = unsharded is not None and len(unsharded) > 0
        self._parts: list[FSDPModule] = []
        for part in (*blocks_of(computed), computed):
            if shard_base or any(value.requires_grad for value in part.parameters()):
                fully_shard(
                    part,
                    mesh=mesh,
                    mp_policy=precision,
                    ignored_params=unsharded,
                    reshard_after_forward=False if gathered_once else None,
                )
                assert isinstance(part, FSDPModule)
                self._parts.append(part)
        assert isinstance(computed, FSDPModule)
        self.root: FSDPModule = computed
        self._shards = mesh.get_group("shard")
        self._whole = self.learned
        self._starts = {name: _start(value) for name, value in self._whole.items()}
        # The optimizer steps this rank's rows as plain tensors: a DTensor costs the host several times as much.
        self._rows = {name: _local(value).requires_grad_() for name, value in self._whole.items()}
        self._begin(self._rows)

    @contextmanager
    def reducing(self, *, last: bool) -> Iterator[None]:
        """See `Strategy`."""
        self.root.set_requires_gradient_sync(last)
        yield

    def step(self, lr: float, gate: Gate) -> Tensor:
        """See `Strategy`."""
        for name, rows in self._rows.items():
            whole = self._whole[name]
            rows.grad = None if whole.grad is None else _local(whole.grad)
            whole.grad = None
        return super().step(lr, gate)

    def held(self) -> dict[str, TrainedRange]:
        """See `Strategy`."""
        ranges = {}
        for name, rows in self._rows.items():
            shape, start, state = tuple(self._whole[name].shape), self._starts[name], self.optimizer.state[rows]
            moments = {kind: FlatRange(state[kind].view(-1), shape, start) for kind in MOMENTS}
            ranges[name] = TrainedRange(FlatRange(rows.detach().view(-1), shape, start), moments)
        return ranges

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        # The caller does not call the root module, whose hooks would gather the weights that belong to no block.
        # Without a backward pass, blocks may stay gathered too, and would miss the next change of their weights.
        self.root.unshard()
        try:
            yield
        finally:
            for part in self._parts:
                part.reshard()

    def _norm_of_ranks(self, norm: Tensor) -> Tensor:
        squared = norm.double().square()
        dist.all_reduce(squared, group=self._shards)
        return squared.sqrt().to(norm)


def _mesh(device: str, world_size: int, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard"))


def _start(value: Tensor) -> int:
    """Return the offset of this rank's rows in the flattened tensor. This is slow, so it is computed only once."""
    assert isinstance(value, DTensor)
    _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    start = offset[0] * math.prod(value.shape[1:]) if offset else 0
    return start if value.to_local().numel() else 0


def _local(value: Tensor) -> Tensor:
    """Return this rank's rows of a parameter or gradient, which share its memory."""
    assert isinstance(value, DTensor)
    return value.to_local().detach()
