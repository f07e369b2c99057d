"""FSDP2: trained weights, gradients and moments cut among ranks by torch, along each parameter's first dimension.

With `replicas` (HSDP) the ranks are cut into so many groups, each of which holds all; gradients are then averaged
across the groups as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainer.config import TrainConfig
from trainer.ranges import FlatRange
from trainer.strategy import MOMENTS, Computed, Held, TorchStrategy, blocks_of


class Sharded(TorchStrategy):
    """`fully_shard` on every block and on the rest."""

    def __init__(
        self, computed: Computed, settings: TrainConfig, *, world_size: int, replicas: int, shard_base: bool
    ) -> None:
        super().__init__(computed, settings)
        mesh = _mesh(computed.device_type, world_size, replicas)
        self.copies, self.copy = replicas, mesh.get_local_rank("replicate") if replicas > 1 else 0
        # a base that is cut goes to the device block by block, as `fully_shard` is called: nothing may hold on to it
        whole = None if shard_base else {value for value in computed.parameters() if not value.requires_grad}
        precision = MixedPrecisionPolicy(
            param_dtype=None if computed.dtype == torch.float32 else computed.dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for part in (*blocks_of(computed), computed):
            if shard_base or any(value.requires_grad for value in part.parameters()):
                fully_shard(part, mesh=mesh, mp_policy=precision, ignored_params=whole)
        assert isinstance(computed, FSDPModule)
        self.root: FSDPModule = computed
        self._begin()

    def forward(self, x0_BCT: Tensor, positions_B: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Strategy`."""
        return self.computed(x0_BCT, positions_B, mask_BT)

    @contextmanager
    def reducing(self, *, last: bool) -> Iterator[None]:
        """See `Strategy`."""
        self.root.set_requires_gradient_sync(last)
        yield

    def held(self) -> dict[str, Held]:
        """See `Strategy`."""
        return {
            name: Held(
                _local_range(value),
                {kind: _local_range(self.optimizer.state[value][kind]) for kind in MOMENTS},
            )
            for name, value in self.learned.items()
        }

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        # parts are called one by one, not through the root, whose hooks would bring together what lies in no block
        self.root.unshard()
        try:
            yield
        finally:
            self.root.reshard()

    def _whole(self, norm: Tensor) -> Tensor:
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _mesh(device: str, world_size: int, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard"))


def _local_range(value: Tensor) -> FlatRange:
    """The rows that this rank holds, as a range of the flattened tensor."""
    assert isinstance(value, DTensor)
    local = value.to_local().detach()
    _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    row = math.prod(value.shape[1:])
    start = min(offset[0] * row if offset else 0, value.numel())
    return FlatRange(local.reshape(-1), tuple(value.shape), start if local.numel() else 0)
