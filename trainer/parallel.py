"""Where the work is done: ranks, device, precision and the reduction of gradients, through Accelerate.

Nothing here changes what is learned: a global batch is cut among ranks and accumulation steps, and its mean gradient is
the same however it is cut.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from trainer.config import ParallelConfig


class Parallel:
    """This rank among the others. Ranks and rendezvous come from the environment (RANK, WORLD_SIZE, MASTER_ADDR, …)."""

    def __init__(self, config: ParallelConfig) -> None:
        self.config = config
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("parallel.device=cuda, but torch finds no CUDA device here: take parallel.device=cpu")
        on_cpu = config.device == "cpu" or not torch.cuda.is_available()
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if on_cpu:
            torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // world_size))
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision="bf16" if config.precision == "bf16" else "no")
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        """Ranks on this node."""
        self.device: torch.device = self.accelerator.device
        if self.world_size > 1:
            atexit.register(_leave_group)

    @property
    def main(self) -> bool:
        """Whether this rank writes the log."""
        return self.rank == 0

    def parts(self, global_batch: int) -> int:
        """Micro batches to a step on each rank.

        Raises:
            ValueError: the global batch does not divide among ranks and micro batches.
        """
        micro = self.config.micro_batch or global_batch // self.world_size
        if micro == 0 or global_batch % (self.world_size * micro):
            raise ValueError(
                f"a global batch of {global_batch} does not divide among {self.world_size} rank(s) of micro batches of "
                f"{micro or 1}: set parallel.micro_batch or the stage's global_batch"
            )
        return global_batch // (self.world_size * micro)

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module on this rank's device, its gradients reduced over ranks if there are several."""
        return self.accelerator.prepare_model(module)

    def reduce_at(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced once a step, in its last micro batch."""
        return nullcontext() if last else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate."""
        self.accelerator.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter], norm: float) -> Tensor:
        """Clip to a global gradient norm; returns the norm before."""
        return self.accelerator.clip_grad_norm_(parameters, norm)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.accelerator.reduce(tensor, reduction="sum")

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag if self.world_size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks, in the order of the global batch, of which each rank has every world_size-th row."""
        return self.accelerator.gather(tensor).unflatten(0, (self.world_size, -1)).transpose(0, 1).flatten(0, 1)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Make tensors those of rank 0, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                tensor.data.copy_(broadcast(tensor.detach().clone()))

    def wait(self) -> None:
        """Until all ranks are here."""
        self.accelerator.wait_for_everyone()


def _leave_group() -> None:
    """Its threads don't survive the interpreter's end."""
    if dist.is_initialized():
        dist.destroy_process_group()
