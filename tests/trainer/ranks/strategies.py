"""The functions that the ranks of `test_strategies.py` run.

A rank tries every strategy in one process group, because starting ranks is slow.

The model is the autoencode stage of the tiny recipe: g, f and LoRA on a frozen D.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from models.dit import DiT
from models.weights import save_weights
from tests.system_packages import COMPILER, missing
from trainer.checkpoints import checkpoint
from trainer.checkpoints.ema import EMA
from trainer.checkpoints.saver import Saver
from trainer.checkpoints.state import TrainState
from trainer.health import Health
from trainer.inputs import Inputs
from trainer.ranks.collective import gather
from trainer.ranks.flat_ranges import FlatRange
from trainer.ranks.gate import NO_LIMIT, NO_STEP, Gate
from trainer.ranks.parallel import Parallel
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import CheckpointConfig, Config
from trainer.tasks import make_task

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
VARIANTS: dict[str, tuple[str, ...]] = {name: (f"parallel.strategy={name}",) for name in STRATEGIES} | {
    "ddp, accumulated": ("parallel.micro_batch=1",),
    "zero2, accumulated": ("parallel.strategy=zero2", "parallel.micro_batch=1"),
    "zero3, accumulated": ("parallel.strategy=zero3", "parallel.micro_batch=1"),
    "fsdp2, accumulated": ("parallel.strategy=fsdp2", "parallel.micro_batch=1"),
    "ddp, recomputed": ("parallel.checkpoint_activations=true",),
    "zero3, recomputed": ("parallel.strategy=zero3", "parallel.checkpoint_activations=true"),
    "fsdp2, recomputed": ("parallel.strategy=fsdp2", "parallel.checkpoint_activations=true"),
    "fsdp2, base sharded": ("parallel.strategy=fsdp2", "parallel.shard_base=true"),
    "zero1, offloaded": ("parallel.strategy=zero1", "parallel.offload=optimizer"),
    "zero3, offloaded": ("parallel.strategy=zero3", "parallel.offload=all"),
}
LOWER = {
    f"{name}, {precision}": (f"parallel.strategy={name}", f"parallel.precision={precision}")
    for name in STRATEGIES
    for precision in ("bf16", "fp16")
}
ROUNDED = {
    f"{name}, gradients in bf16": (f"parallel.strategy={name}", "parallel.gradient_precision=bf16")
    for name in STRATEGIES
}
COMPILED = {"ddp, compiled": ("parallel.compile=true",)}
BATCH, STEPS, LR = 4, 3, 2e-3


def recipe(folder: Path, *overrides: str) -> Config:
    """The tiny recipe on a D that `make_base` wrote."""
    pinned = ["parallel.device=cpu", "parallel.threads=1", f"autoencode.global_batch={BATCH}"]
    small = [f"pretrained.folder={folder / 'base'}", f"run_dir={folder / 'run'}", "autoencode.clip_norm=0.5"]
    return load_recipe("tiny", [*pinned, *small, "autoencode.ema_halflife=8", *overrides])


def make_base(folder: Path) -> None:
    """Write a D with noise added, because a fresh D outputs zeros and a trained one does not."""
    (folder / "base").mkdir()
    torch.manual_seed(1)
    dit = DiT(recipe(folder).dit)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    from dataclasses import asdict

    save_weights(folder / "base" / "dit.safetensors", dit.state_dict(), asdict(dit.config))


@dataclass
class Trained:
    """A strategy in training, with its state."""

    config: Config
    parallel: Parallel
    state: TrainState
    samples: int = 0

    @classmethod
    def begin(cls, config: Config) -> Trained:
        parallel = Parallel(config.parallel)
        settings = config.stage("autoencode")
        torch.manual_seed(0)
        task = make_task(config, "autoencode")
        torch.manual_seed(2)
        with torch.no_grad():  # a fresh f outputs zeros, and g and LoRA would have no gradient for two steps
            for parameter in (*task.learned.values(), *task.statistics.values()):
                parameter.add_(torch.randn_like(parameter) * 0.02)
        task.to(parallel.device)
        strategy = parallel.prepare(task.module, settings)
        if config.parallel.precision == "fp16":
            strategy.scale = 256.0
        values = {name: held.value.data for name, held in strategy.held().items()}
        ema = EMA(values, halflife=settings.ema_halflife, refresh=strategy.refresh)
        return cls(config, parallel, TrainState(task, strategy, ema, Health(config.health, scaled=False), parallel))

    def step(self, *, accepted: bool = True, poisoned: bool = False) -> float:
        """Train one global batch and return its mean loss over all ranks.

        Args:
            accepted: whether the update is applied.
            poisoned: make the loss of one sample on one rank NaN.
        """
        parallel, strategy = self.parallel, self.state.strategy
        x0_BCT = torch.randn(BATCH, 128, 63, generator=torch.Generator().manual_seed(self.samples))
        if poisoned:
            x0_BCT[-1, 0, 0] = float("nan")
        positions_B = torch.arange(self.samples, self.samples + BATCH)
        mine = slice(parallel.rank, None, parallel.world_size)
        parts = parallel.micro_batches(BATCH)
        x0_BCT, positions_B = x0_BCT.to(parallel.device), positions_B.to(parallel.device)
        total = torch.zeros((), dtype=torch.float64, device=parallel.device)
        chunks = zip(x0_BCT[mine].chunk(parts), positions_B[mine].chunk(parts), strict=True)
        for part, (x0, positions) in enumerate(chunks, start=1):
            with strategy.reducing(last=part == parts):
                losses_B = strategy.forward(Inputs(x0=x0, positions=positions)).total({})
                strategy.backward(losses_B.mean() / parts, last=part == parts)
            total += losses_B.detach().double().sum()
        norm = float(strategy.step(LR, Gate(total.new_zeros(()), NO_LIMIT if accepted else NO_STEP)))
        assert math.isfinite(norm) != poisoned
        self.samples += BATCH
        self.state.ema.update(self.samples, BATCH)
        return float(parallel.sum(total)) / BATCH

    def steps(self, count: int = STEPS) -> list[float]:
        return [self.step() for _ in range(count)]

    def save(self, folder: Path) -> Path:
        meta = {"steps": self.samples // BATCH, "base": self.state.task.base_hash}
        with Saver(folder, CheckpointConfig()) as saver:
            saver.save(self.samples, self.state.owned(), meta)
        return checkpoint.checkpoints(folder)[-1]

    def load(self, path: Path) -> None:
        self.state.load(path)
        self.samples = self.state.samples

    def copy(self) -> dict[str, torch.Tensor]:
        """Return a copy of the state that this rank owns."""
        return {name: part.data.clone() for name, part in self.state.owned().items()}

    def whole(self) -> dict[str, torch.Tensor]:
        return self.parallel.whole(self.state.owned())


def first(rank: int, world_size: int, folder: str) -> None:
    """Train each variant from the beginning, with a checkpoint half-way; write the losses and facts about the state."""
    results: dict[str, Any] = {}
    with group():
        variants = VARIANTS | (LOWER if world_size < 4 else {}) | (ROUNDED if world_size == 2 else {})
        if world_size == 1 and not missing(COMPILER):
            variants = variants | COMPILED
        if world_size == 4:
            variants = variants | {"fsdp2, replicated": ("parallel.strategy=fsdp2", "parallel.replicas=2")}
        for name, overrides in variants.items():
            if "accumulated" in name and world_size == BATCH:
                continue
            trained = Trained.begin(recipe(Path(folder), *overrides))
            curve = trained.steps()
            path = trained.save(Path(folder) / f"{name} on {world_size}")
            weights = trained.whole()
            curve += trained.steps()
            before = trained.copy()
            trained.step(accepted=False)
            trained.step(poisoned=True)
            after = trained.copy()
            trained.step()
            moved = trained.copy()
            results[name] = {
                "curve": curve,
                "shapes": {name: list(value.shape) for name, value in weights.items()},
                "norms": {name: float(value.norm()) for name, value in weights.items()},
                "kept when refused": all(gather(_same(before, after, "param/", "exp_avg"))),
                "moved after": not all(gather(_same(after, moved, "param/"))),
                "finite": all(gather(all(map(_finite, moved.values())))),
                "held": sum(len(part.data) for part in trained.state.held().values()),
                "path": str(path),
            }
    _write(folder, f"first_{world_size}", rank, results)


def resumed(rank: int, world_size: int, folder: str, paths: list[str]) -> None:
    """Resume each strategy from each checkpoint; write whether its state is equal, and the losses from there on."""
    results: dict[str, Any] = {}
    with group():
        for name in STRATEGIES:
            trained = Trained.begin(recipe(Path(folder), *VARIANTS[name]))
            for path in paths:
                _spoil(trained.state.held())
                trained.load(Path(path))
                whole, stored = trained.whole(), _stored(Path(path), trained) if rank == 0 else {}
                results[f"{name} from {path}"] = {
                    "equal": all(torch.equal(whole[key], stored[key]) for key in whole),
                    "names": sorted(whole) == sorted(stored),
                    "curve": trained.steps(),
                }
    _write(folder, f"resumed_{world_size}", rank, results)


def let_go(rank: int, folder: str) -> None:
    """Train three times per strategy, as a process of several stages does; write the bytes of live tensors left."""
    left: dict[str, list[int]] = {}
    with group():
        for name in STRATEGIES:
            for _ in range(3):
                trained = Trained.begin(recipe(Path(folder), *VARIANTS[name]))
                trained.steps(1)
                trained.state.strategy.close()
                del trained
                gc.collect()
                tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
                left.setdefault(name, []).append(sum(each.untyped_storage().nbytes() for each in tensors))
    _write(folder, "let_go", rank, left)


def evaluated(rank: int, folder: str) -> None:
    """Evaluate each strategy without gradients, change its weights, and take a step; write the step's loss."""
    losses: dict[str, float] = {}
    with group():
        for name in STRATEGIES:
            trained = Trained.begin(recipe(Path(folder), *VARIANTS[name]))
            strategy, module = trained.state.strategy, trained.state.task.module
            inputs = Inputs(x0=torch.randn(2, 128, 63), positions=torch.arange(2))
            trained.step()
            with strategy.together():
                module(inputs)
            for held in strategy.held().values():
                held.value.data.mul_(0.5)
            strategy.refresh()
            losses[name] = trained.step()
    _write(folder, "evaluated", rank, losses)


def unclipped(rank: int, folder: str) -> None:
    """Train each strategy with clipping at a norm that no gradient has, and without; write the losses."""
    curves: dict[str, dict[str, list[float]]] = {}
    with group():
        for name in STRATEGIES:
            for clip in ("1e9", "null"):
                trained = Trained.begin(recipe(Path(folder), *VARIANTS[name], f"autoencode.clip_norm={clip}"))
                curves.setdefault(name, {})[clip] = trained.steps()
    _write(folder, "unclipped", rank, curves)


@contextmanager
def group() -> Iterator[None]:
    """Let DeepSpeed use fp16 on any CPU, and destroy the process group at the end.

    DeepSpeed refuses fp16 on a CPU without fp16 instructions, although torch computes it there.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if (groups := sys.modules.get("deepspeed.utils.groups")) is not None:
            groups._WORLD_GROUP = None  # DeepSpeed would go on with the group that is gone


def _spoil(ranges: dict[str, FlatRange]) -> None:
    """Fill the state with NaN, so that a value that a load forgets shows."""
    for part in ranges.values():
        part.data.fill_(float("nan"))


def _stored(path: Path, trained: Trained) -> dict[str, torch.Tensor]:
    """Read a checkpoint's whole tensors without the ranges of any strategy."""
    shapes = checkpoint.read_manifest(path)["tensors"]
    tensors = {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}
    files = checkpoint.read_manifest(path)["files"]
    from safetensors import safe_open

    for file_name, entry in files.items():
        with safe_open(path / file_name, framework="pt") as file:
            for name, (start, stop) in entry["ranges"].items():
                tensors[name].view(-1)[start:stop] = file.get_tensor(name)
    return tensors


def _finite(value: torch.Tensor) -> bool:
    return bool(value.isfinite().all())


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *kinds: str) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one if name.startswith(kinds))


def _write(folder: str, what: str, rank: int, results: dict[str, Any]) -> None:
    if rank == 0:
        (Path(folder) / f"{what}.json").write_text(json.dumps(results))
