"""One system of `checkpoint.py` as a rank: python checkpoint_peers.py SYSTEM save|half|universal FOLDER.

All train the very same module on the same batches with AdamW over what is trained; each saves and loads its own way.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import give
from subject import STAGE, LossOnly, batches, recipe, task_of
from torch import Tensor

from trainer.inputs import Inputs
from trainer.recipes.schema import Config
from trainer.tasks import Task

SIZE = ("dit.width=1024", "dit.depth=8", "dit.hidden_width=4096", "latent_encoder.width=384")
RECIPE = (*SIZE, "lora.rank=32", "lora.alpha=32", "autoencode.global_batch=2", "autoencode.lr=1e-3")
GLOBAL_BATCH, LR, WARM, USUAL, SAVES, BESIDE, LOADS = 2, 1e-3, 3, 4, 5, 2, 3


class System(ABC):
    """A module under training that can be saved and loaded."""

    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    trained = frozen = 0

    def task(self, config: Config) -> Task:
        """What is trained, counted."""
        task = task_of(config)
        self.trained = sum(value.numel() for value in task.learned.values())
        self.frozen = sum(value.numel() for value in task.module.parameters()) - self.trained
        return task

    @abstractmethod
    def __init__(self, config: Config) -> None: ...

    @abstractmethod
    def step(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor:
        """One step; the losses (b,) before it."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Save to a new folder; training stands still until it returns."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """Everything back."""

    def stood(self, saving: float) -> float:
        """Seconds that training stood still for the last save, whose call took so many."""
        return saving

    def settle(self, path: Path) -> None:
        """Until a save is on the disk."""
        if self.rank == 0:
            for file in (file for file in path.rglob("*") if file.is_file()):
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        wait()

    def fingerprint(self) -> str | None:
        """Of all that is saved, where that can be told at any world size."""
        return None


class Ours(System):
    """This project, under one of its strategies."""

    def __init__(self, config: Config, strategy: str) -> None:
        from trainer.checkpoints.ema import EMA
        from trainer.checkpoints.saver import Saver
        from trainer.checkpoints.state import TrainState
        from trainer.health import Health
        from trainer.ranks.parallel import Parallel

        config.parallel.strategy = strategy
        settings = config.stage(STAGE)
        self.parallel = Parallel(config.parallel)
        task = self.task(config)
        self.strategy = self.parallel.prepare(task.module, settings)
        values = {name: held.value.data for name, held in self.strategy.held().items()}
        self.ema = EMA(values, halflife=settings.ema_halflife, refresh=self.strategy.refresh)
        self.state = TrainState(task, self.strategy, self.ema, Health(config.health, scaled=False), self.parallel)
        self.saver = Saver(Path(config.run_dir), config.checkpoint)
        self.base, self.steps = task.base_hash, 0

    def step(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor:
        losses_B = self.strategy.forward(Inputs(x0=x0_BCT, positions=positions_B)).total({})
        self.strategy.backward(losses_B.mean(), last=True)
        self.saver.copied()  # as the loop does
        self.strategy.step(LR, lambda norm: True)
        self.steps += 1
        self.ema.update(self.steps * GLOBAL_BATCH, GLOBAL_BATCH)
        return losses_B.detach()

    def save(self, path: Path) -> None:
        meta = {"steps": self.steps, "base": self.base}
        self.saver.save(int(path.name.removeprefix("step_")), self.state.owned(), meta)

        self.called = self.saver.stalled

    def stood(self, saving: float) -> float:
        return saving + self.saver.stalled - self.called  # with what a step waited for the copy

    def settle(self, path: Path) -> None:
        self.saver.wait()

    def load(self, path: Path) -> None:
        """As the loop does: the newest whole checkpoint, its checksums verified."""
        from trainer.checkpoints import checkpoint

        newest = checkpoint.latest(path.parent)
        assert newest == path, f"{newest} is found, not {path}"
        self.state.load(newest)
        self.steps = self.state.steps

    def fingerprint(self) -> str | None:
        digest = hashlib.sha256()
        for name, value in sorted(self.parallel.whole(self.state.owned()).items()):
            digest.update(name.encode())
            digest.update(value.contiguous().view(-1).numpy().data)
        return digest.hexdigest()


class Accelerated(System):
    """Accelerate around DDP, or around DeepSpeed with the options of its `save_checkpoint`."""

    def __init__(self, config: Config, zero: int = 0, **saving: bool) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        torch.set_num_threads(1)
        if zero:
            deepspeed()
            plugin = DeepSpeedPlugin(hf_ds_config=zero_settings(config, zero))
            gloo = InitProcessGroupKwargs(backend="gloo")
            self.accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo])
        else:
            self.accelerator = Accelerator(cpu=True)
        assert self.accelerator.num_processes == self.world_size
        self.zero, self.saving = zero, saving
        model = LossOnly(self.task(config).module)
        self.model, self.optimizer = self.accelerator.prepare(model, adamw(model, config))

    def step(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor:
        losses_B = self.model(x0_BCT, positions_B)
        self.accelerator.backward(losses_B.mean())
        if not self.zero:
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses_B.detach()

    def save(self, path: Path) -> None:
        self.accelerator.save_state(str(path), **self.saving)

    def load(self, path: Path) -> None:
        self.accelerator.load_state(str(path), **({"load_module_strict": False} if self.saving else {}))


class DeepSpeed(System):
    """DeepSpeed's own engine and checkpoints."""

    def __init__(self, config: Config, universal: bool = False, **saving: bool) -> None:
        torch.set_num_threads(1)
        settings = zero_settings(config, 2) | ({"checkpoint": {"load_universal": True}} if universal else {})
        self.saving = saving
        library, model = deepspeed(), LossOnly(self.task(config).module)
        self.engine, *_ = library.initialize(model=model, optimizer=adamw(model, config), config=settings)

    def step(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor:
        losses_B = self.engine(x0_BCT, positions_B)
        self.engine.backward(losses_B.mean())
        self.engine.step()
        return losses_B.detach()

    def save(self, path: Path) -> None:
        self.engine.save_checkpoint(str(path.parent), tag=path.name, **self.saving)

    def load(self, path: Path) -> None:
        loaded, _ = self.engine.load_checkpoint(
            str(path.parent), tag=path.name, load_module_strict=not self.saving.get("exclude_frozen_parameters", False)
        )
        if loaded is None:
            raise ValueError(f"load_checkpoint found nothing in {path}")


EXCLUDE = {"exclude_frozen_parameters": True}
SYSTEMS: dict[str, Callable[[Config], System]] = {
    "ours ddp": lambda config: Ours(config, "ddp"),
    "ours zero2": lambda config: Ours(config, "zero2"),
    "ours zero3": lambda config: Ours(config, "zero3"),
    "ours fsdp2": lambda config: Ours(config, "fsdp2"),
    "accelerate ddp": lambda config: Accelerated(config),
    "accelerate zero2": lambda config: Accelerated(config, 2),
    "accelerate zero2, no base": lambda config: Accelerated(config, 2, **EXCLUDE),
    "deepspeed zero2": lambda config: DeepSpeed(config),
    "deepspeed zero2, no base": lambda config: DeepSpeed(config, **EXCLUDE),
}
UNIVERSAL: dict[str, Callable[[Config], System]] = {
    "deepspeed zero2": lambda config: DeepSpeed(config, universal=True),
    "deepspeed zero2, no base": lambda config: DeepSpeed(config, universal=True, **EXCLUDE),
}


def deepspeed() -> Any:
    """The library, without the operator that it would compile."""
    import logging

    import deepspeed as library

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    library.init_distributed(dist_backend="gloo")
    return library


def zero_settings(config: Config, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // System.world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.stage(STAGE).clip_norm,
        "zero_optimization": {"stage": stage, "contiguous_gradients": True, "reduce_bucket_size": 10_000_000},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }


def adamw(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    settings = config.stage(STAGE)
    trained = [value for value in model.parameters() if value.requires_grad]
    betas = (settings.betas[0], settings.betas[1])
    return torch.optim.AdamW(trained, lr=LR, betas=betas, weight_decay=settings.weight_decay, fused=True)


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def most(seconds: float) -> float:
    """Of all ranks."""
    value = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def mean(losses_B: Tensor) -> float:
    """Over all ranks."""
    total = losses_B.double().sum()
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total) / GLOBAL_BATCH


class Training:
    """A system going through its batches, each step timed."""

    def __init__(self, system: System, start: int = 0) -> None:
        self.system, self.seconds, self.samples = system, [0.0], start
        self.batches = batches(GLOBAL_BATCH, System.rank, System.world_size, start)

    def steps(self, count: int) -> list[float]:
        """Losses; `seconds` are those of these steps."""
        losses, self.seconds = [], []
        for _ in range(count):
            start = time.perf_counter()
            losses.append(mean(self.system.step(*next(self.batches))))
            self.seconds.append(most(time.perf_counter() - start))
            self.samples += GLOBAL_BATCH
        return losses


@contextmanager
def appearing(path: Path) -> Iterator[Callable[[], float]]:
    """When a folder appears, in seconds from now, seen by a thread that hardly does anything else."""
    start, found = time.perf_counter(), [float("nan")]

    def look() -> None:
        while not path.exists():
            time.sleep(0.005)
        found[0] = time.perf_counter() - start

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield lambda: (thread.join(), found[0])[1]


def save(system: System, folder: Path) -> dict[str, Any]:
    """Steps, saves with steps beside them, a load, and whether it goes on as before."""
    training, stalls, extra = Training(system), [], []
    training.steps(WARM)
    training.steps(USUAL)
    usual = statistics.median(training.seconds)
    wholes = []
    for _ in range(SAVES):
        path = folder / f"step_{training.samples:012d}"
        fingerprint = system.fingerprint()
        clean_disk()
        with appearing(path) as seconds_until:
            start = time.perf_counter()
            system.save(path)
            stood = time.perf_counter() - start
            losses, at = training.steps(BESIDE), training.samples - BESIDE * GLOBAL_BATCH
            stalls.append(most(system.stood(stood)))
            extra.append(sum(training.seconds) - BESIDE * usual)
            if isinstance(system, Ours):
                system.settle(path)
                wholes.append(seconds_until())
    if not isinstance(system, Ours):
        wholes = [whole(system, folder / "whole") for _ in range(3)]
    loads = [load(system, path) for _ in range(LOADS)]
    same = _same(fingerprint, system.fingerprint())
    again = Training(system, at).steps(BESIDE)
    return {
        **{"path": str(path), "samples": at, "losses": losses, "fingerprint": fingerprint},
        **{"stall_s": stalls, "extra_s": extra, "whole_s": wholes, "load_s": loads, "step_s": usual},
        **{"trained": system.trained, "frozen": system.frozen},
        **{"bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file())},
        **{"same": same, "departs": departure(losses, again)},
    }


def clean_disk() -> None:
    """Nothing of what was written before is under way."""
    if System.rank == 0:
        os.sync()
    wait()


def whole(system: System, path: Path) -> float:
    """Seconds until a peer's save is on the disk, as it does not see to that itself."""
    clean_disk()
    start = time.perf_counter()
    system.save(path)
    system.settle(path)
    seconds = most(time.perf_counter() - start)
    if System.rank == 0:
        shutil.rmtree(path)
    wait()
    return seconds


def load(system: System, path: Path) -> float:
    wait()
    start = time.perf_counter()
    system.load(path)
    return most(time.perf_counter() - start)


def half(system: System, folder: Path) -> dict[str, Any]:
    """A checkpoint of more ranks: what comes of loading it, and how it goes on; `saved.json` tells of it."""
    saved = json.loads((folder / "saved.json").read_text())
    try:
        seconds = load(system, Path(saved["path"]))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    same = _same(saved["fingerprint"], system.fingerprint())
    losses = Training(system, saved["samples"]).steps(BESIDE)
    return {"load_s": seconds, "same": same, "departs": departure(saved["losses"], losses)}


def _same(before: str | None, after: str | None) -> bool | None:
    return before == after if before else None


def departure(before: list[float], after: list[float]) -> float:
    """Largest relative difference of losses; the second one of them depends on the moments too."""
    return max(abs(one - other) / abs(one) for one, other in zip(before, after, strict=True))


def main() -> None:
    name, action, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    config = recipe(folder.parent, *RECIPE, f"run_dir={folder}")
    systems = UNIVERSAL if action == "universal" else SYSTEMS
    result = (save if action == "save" else half)(systems[name](config), folder)
    if System.rank == 0:
        give(result)
    wait()
    sys.stdout.flush()
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(0)  # threads of a process group don't survive the interpreter's own end


if __name__ == "__main__":
    main()
