"""Ranks, device, precision, and the strategy by which ranks share a module.

None of these change what is learned: a global batch is split among ranks and gradient accumulation steps, and its mean
gradient does not depend on the split or on where the weights are held.
"""

from __future__ import annotations

import atexit
import math
import os
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast
from torch import Tensor, nn

from trainer.cpus import usable_threads
from trainer.ranks import collective, rendezvous
from trainer.ranks.allocator import keep_freed_memory
from trainer.ranks.compiling import compile_blocks, compiles
from trainer.ranks.flat_ranges import FlatRange
from trainer.ranks.frozen_base import convert_base, require_device
from trainer.ranks.gloo import prepare_gloo
from trainer.ranks.graph import CudaRecorder, require_cuda
from trainer.ranks.graphed import Graphed
from trainer.ranks.strategy import DTYPES, PrecisionModule, Replicated, Strategy, blocks_of, recompute
from trainer.recipes.parallel import ParallelConfig
from trainer.recipes.schema import TrainConfig

_BUCKET = 2**24  # numbers that one collective of `Parallel.whole` gathers


class Parallel:
    """This rank's device and collectives. The environment (RANK, WORLD_SIZE, MASTER_ADDR, …) sets the rendezvous."""

    def __init__(self, config: ParallelConfig, *, timeout: timedelta | None = None) -> None:
        """Join the process group; `timeout` is that of its collectives (None: torch's default).

        Raises:
            ValueError: the recipe wants a CUDA device, CUDA graphs or products in FP8, which are not there, or
                `parallel.replicas` does not divide the number of ranks.
        """
        self.config = config
        _allow_many_files()
        if rendezvous.are_on_one_machine():
            rendezvous.stay_inside()
        prepare_gloo(int(os.environ.get("WORLD_SIZE") or 1))
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("parallel.device=cuda, but torch finds no CUDA device here: set parallel.device=cpu")
        on_cpu = config.device == "cpu" or not torch.cuda.is_available()
        backend = "gloo" if on_cpu else "nccl"
        if rendezvous.are_on_one_machine() and not dist.is_initialized():
            rendezvous.join_inside(backend, timeout)
        self.accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)])
        if on_cpu:
            keep_freed_memory()
            # After Accelerate, which counts the machine's cores where OMP_NUM_THREADS is not set.
            here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
            torch.set_num_threads(config.threads or usable_threads(here))
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        """Ranks on this node."""
        self.device: torch.device = self.accelerator.device
        require_device(config, self.device)
        require_cuda(config, self.device)
        if self.world_size % config.replicas:
            raise ValueError(
                f"parallel.replicas={config.replicas} does not divide {self.world_size} rank(s): set it to a divisor, "
                f"such as the number of nodes"
            )
        if config.strategy != "ddp" and not dist.is_initialized():  # FSDP2 and ZeRO need a group even for one rank.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if dist.is_initialized():
            atexit.register(_leave_group)
        self._host_group = collective.own_group() if self.device.type != "cpu" and self.world_size > 1 else None
        """The group of the collectives on host memory, where the default group works on devices."""

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes the log and the status."""
        return self.rank == 0

    @property
    def shards_base(self) -> bool:
        """Whether the frozen base is sharded among ranks."""
        return self.config.strategy == "zero3" or (self.config.strategy == "fsdp2" and self.config.shard_base)

    def micro_batches(self, global_batch: int) -> int:
        """Return the number of micro batches per step on each rank.

        Raises:
            ValueError: the global batch cannot be divided evenly among ranks and micro batches.
        """
        micro = self.config.micro_batch or global_batch // self.world_size
        if micro == 0 or global_batch % (self.world_size * micro):
            raise ValueError(
                f"a global batch of {global_batch} cannot be divided evenly among {self.world_size} rank(s) with micro "
                f"batches of {micro or 1}: change parallel.micro_batch or the stage's global_batch"
            )
        return global_batch // (self.world_size * micro)

    def prepare(self, module: nn.Module, settings: TrainConfig) -> Strategy:
        """Put a module under the config's strategy.

        The module must have the same weights on all ranks and be on this rank's device, except frozen weights, which
        may still be in host memory. Frozen weights are converted to the compute precision, or to FP8. While they are
        moved, the device never holds more of them than this rank's part and one block.
        """
        config, dtype = self.config, DTYPES[self.config.precision]
        exchanged_in = DTYPES[config.gradient_precision]
        convert_base(module, config, self.device)
        self._hold_frozen(module, dtype)
        if config.checkpoint_activations:
            for block in blocks_of(module):
                recompute(block)
        if compiles(config, self.device):
            compile_blocks(blocks_of(module), required=config.compile is True)
        computed = PrecisionModule(module, self.device, dtype, keeps_casts=not config.graph)
        if config.strategy == "ddp":
            ranks: Any = {"rank": self.rank, "world_size": self.world_size, "exchanged_in": exchanged_in}
            if config.graph:
                return Graphed(computed, settings, CudaRecorder(self.device), **ranks)
            return Replicated(computed, settings, **ranks)
        if config.strategy == "fsdp2":
            from trainer.ranks.fsdp import Sharded

            return Sharded(
                computed,
                settings,
                world_size=self.world_size,
                replicas=config.replicas,
                shard_base=config.shard_base,
                exchanged_in=exchanged_in,
            )
        from trainer.ranks.zero import Zero

        parts = self.micro_batches(settings.global_batch)
        return Zero(
            computed,
            settings,
            config,
            stage=int(config.strategy.removeprefix("zero")),
            parts=parts,
            micro=settings.global_batch // (self.world_size * parts),
        )

    def _hold_frozen(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Convert frozen weights to a dtype one by one, and move them to the device unless the strategy shards them."""
        for parameter in module.parameters():
            if not parameter.requires_grad:
                held = parameter.data.to(dtype)
                parameter.data = held if self.shards_base else held.to(self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over ranks."""
        return self.accelerator.reduce(tensor, reduction="sum")

    def agree(self, number: Tensor, *flags: bool) -> Callable[[], tuple[Tensor, list[bool]]]:
        """Sum a number over ranks, and find whether each flag is set on any rank. All ranks.

        The number stays on the device and the flags travel in host memory, so that the host does not wait for the
        device. On a CPU both are one collective.

        Args:
            number: (), float64, on this rank's device.
            flags: any number of flags.

        Returns:
            A function that waits for the ranks and returns the sum and the flags, which are the same on all ranks. The
            collectives overlap with the work that is done before this function is called.
        """
        if self.world_size == 1:
            return lambda: (number, list(flags))
        counts = torch.tensor(flags, dtype=torch.float64)
        if self.device.type == "cpu":
            values = torch.cat((number[None], counts))
            total, counts, works = values[0], values[1:], [_sum_of_ranks(values)]
        else:
            total = number.clone()
            works = [_sum_of_ranks(total), _sum_of_ranks(counts, self._host_group)]

        def agreed() -> tuple[Tensor, list[bool]]:
            for work in works:
                work.wait()
            return total, (counts > 0).tolist()

        return agreed

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. All ranks."""
        return self.agree(torch.zeros((), dtype=torch.float64, device=self.device), flag)()[1][0]

    def give_up_after(self, timeout: timedelta) -> None:
        """Set the timeout of all process groups, including those that a strategy created."""
        for group in list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else ():
            dist.distributed_c10d._set_pg_timeout(timeout, group)

    def whole(self, ranges: Mapping[str, FlatRange]) -> dict[str, Tensor]:
        """Gather whole tensors from all ranks' ranges into rank 0's host memory; returns {} on other ranks. All ranks.

        Each element must belong to exactly one rank's range.
        """
        tensors: dict[str, Tensor] = {}
        for names in _buckets({name: math.prod(part.shape) for name, part in ranges.items()}):
            flats = [torch.zeros(math.prod(ranges[name].shape), device=self.device) for name in names]
            for name, flat in zip(names, flats, strict=True):
                part = ranges[name]
                flat[part.start : part.stop] = part.data.to(self.device)
            together = self.sum(torch.cat(flats))
            if self.main:
                whole = together.cpu().split([len(flat) for flat in flats])
                tensors |= {name: flat.view(ranges[name].shape) for name, flat in zip(names, whole, strict=True)}
        return tensors

    def gather(self, tensor: Tensor) -> Tensor:
        """Gather rows of all ranks in the order of the global batch: each rank has every world_size-th row of it."""
        return self.accelerator.gather(tensor).unflatten(0, (self.world_size, -1)).transpose(0, 1).flatten(0, 1)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors in place with those of rank 0."""
        if self.world_size > 1:
            for tensor in tensors:
                tensor.data.copy_(broadcast(tensor.detach().clone()))

    def memory(self) -> tuple[int, int]:
        """Return the peak memory in use and the total memory of the device, in bytes; of the host on a CPU."""
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            return torch.cuda.max_memory_allocated(self.device), total
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def wait(self) -> None:
        """Wait until all ranks have called this method."""
        self.accelerator.wait_for_everyone()


def _allow_many_files() -> None:
    """Raise this process's limit of open files to what it may be: Gloo opens a socket for each other rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # macOS refuses its own `unlimited`
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _sum_of_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> dist.Work:
    """Start to sum a tensor over ranks, in place."""
    work = dist.all_reduce(values, group=group, async_op=True)
    assert work is not None
    return work


def _buckets(numbers: Mapping[str, int]) -> Iterator[list[str]]:
    """Group names into buckets: large enough to be worth a collective, and small enough to fit into memory."""
    names: list[str] = []
    total = 0
    for name, count in numbers.items():
        names.append(name)
        total += count
        if total >= _BUCKET:
            yield names
            names, total = [], 0
    if names:
        yield names


def _leave_group() -> None:
    """Destroy the process group at exit, because its threads must end before the interpreter does."""
    if dist.is_initialized():
        dist.destroy_process_group()
