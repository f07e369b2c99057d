"""The functions that the ranks of `test_memory.py` run: a step under each strategy, and the bytes that a rank holds."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.dit import DiT
from models.weights import save_weights
from trainer.checkpoints.ema import EMA
from trainer.inputs import Inputs
from trainer.ranks.gate import NO_LIMIT, Gate
from trainer.ranks.parallel import Parallel
from trainer.ranks.strategy import Strategy, TorchStrategy
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.tasks import make_task

BATCH = 4
WAYS = {
    "ddp": ("strategy=ddp",),
    "zero1": ("strategy=zero1",),
    "zero2": ("strategy=zero2",),
    "zero3": ("strategy=zero3",),
    "fsdp2": ("strategy=fsdp2",),
    "fsdp2, base cut": ("strategy=fsdp2", "shard_base=true"),
    "zero2, offloaded": ("strategy=zero2", "offload=optimizer"),
    "zero3, offloaded": ("strategy=zero3", "offload=all"),
}
PRECISIONS = ("fp32", "bf16")


def overrides(way: str, precision: str) -> list[str]:
    """Return the overrides that make the tiny recipe train in this way and precision."""
    return [f"parallel.{each}" for each in (*WAYS[way], f"precision={precision}")]


def recipe(folder: Path, *given: str) -> Config:
    """The tiny recipe on a D that `make_base` wrote."""
    pinned = ["parallel.device=cpu", "parallel.threads=1", f"autoencode.global_batch={BATCH}"]
    return load_recipe("tiny", [*pinned, f"pretrained.folder={folder / 'base'}", f"run_dir={folder / 'run'}", *given])


def make_base(folder: Path) -> None:
    """Write a pretrained D."""
    (folder / "base").mkdir()
    dit = DiT(recipe(folder).dit)
    save_weights(folder / "base" / "dit.safetensors", dit.state_dict(), dataclasses.asdict(dit.config))


def live(folder: Path, world_sizes: Iterable[int]) -> dict[tuple[str, int], dict[str, int]]:
    """Train on each world size and return the bytes that rank 0 holds, by (way and precision, world size)."""
    runs = {ranks: _start(ranks, folder) for ranks in world_sizes}
    found = {}
    for ranks, run in runs.items():
        while not run.join():
            pass
        results = json.loads((folder / f"held_{ranks}.json").read_text())
        found |= {(name, ranks): result for name, result in results.items()}
    return found


def _start(world_size: int, folder: Path) -> Any:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (world_size, port, str(folder))
    return torch.multiprocessing.spawn(_measured, args=arguments, nprocs=world_size, join=False)


def _measured(rank: int, world_size: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    results = {
        f"{way}, {precision}": _held(recipe(Path(folder), *overrides(way, precision)))
        for way in WAYS
        for precision in PRECISIONS
    }
    if rank == 0:
        (Path(folder) / f"held_{world_size}.json").write_text(json.dumps(results))
    os._exit(0)  # the process group's threads crash if the interpreter shuts down normally


def _held(config: Config) -> dict[str, int]:
    parallel, settings = Parallel(config.parallel), config.autoencode
    strategy = parallel.prepare(make_task(config, "autoencode").module, settings)
    ema = EMA({name: held.value.data for name, held in strategy.held().items()}, halflife=8)
    _pass(strategy, BATCH // parallel.world_size)
    strategy.step(1e-3, Gate(torch.zeros(()), NO_LIMIT))
    parameters = list(strategy.computed.parameters())
    learned = list(strategy.learned.values())
    frozen = [value for value in parameters if not value.requires_grad]
    states = _optimizer(strategy).state.values()
    return {
        "base": _bytes(part for value in frozen for part in _lying(value)),
        "trained": _bytes([*(part for value in learned for part in _lying(value)), *_masters(strategy)]),
        "moments": _bytes(value for state in states for name, value in state.items() if name != "step"),
        "ema": _bytes(ema.averages.values()),
        "gradients": _gradients(strategy, BATCH // parallel.world_size),
    }


def _pass(strategy: Strategy, clips: int) -> None:
    with strategy.reducing(last=True):
        losses = strategy.forward(Inputs(x0=torch.randn(clips, 128, 63), positions=torch.arange(clips)))
        strategy.backward(losses.total({}).mean(), last=True)


def _optimizer(strategy: Any) -> Any:
    return strategy.optimizer if isinstance(strategy, TorchStrategy) else strategy.base


def _lying(value: Any) -> list[Tensor]:
    """Return what this rank holds of a parameter: its data and, under ZeRO-3, its shard."""
    return [value.data, value.ds_tensor] if hasattr(value, "ds_tensor") else [value.data]


def _masters(strategy: Any) -> list[Tensor]:
    if isinstance(strategy, TorchStrategy):
        return []
    optimizer = strategy.optimizer
    return optimizer.fp32_partitioned_groups_flat if strategy.stage == 3 else optimizer.single_partition_of_fp32_groups


def _gradients(strategy: Any, clips: int) -> int:
    """Return the bytes of gradients after another backward pass, before the optimizer's step."""
    _pass(strategy, clips)
    if isinstance(strategy, TorchStrategy):
        return _bytes(value.grad for value in strategy.learned.values() if value.grad is not None)
    optimizer = strategy.optimizer
    if strategy.stage == 3:
        return _bytes([optimizer.grad_partitions_flat_buffer])
    averaged = [part for parts in optimizer.averaged_gradients.values() for part in parts or ()]
    whole = [value.grad for value in strategy.learned.values() if value.grad is not None]
    return _bytes([*averaged, *whole])


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages; a shared storage counts once."""
    here = [value.to_local() if isinstance(value, DTensor) else value for value in tensors]
    storages = [value.untyped_storage() for value in here if value.numel()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
