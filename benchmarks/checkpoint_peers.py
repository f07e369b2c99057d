"""One system of `checkpoint.py` as a rank: python checkpoint_peers.py SYSTEM save|half|universal FOLDER.

All systems train the same module on the same batches with AdamW; each saves and loads in its own way.
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
from ranks import send_result
from subject import STAGE, LossOnly, batches, recipe, task_of
from torch import Tensor

from trainer.inputs import Inputs
from trainer.ranks.gate import NO_LIMIT, Gate
from trainer.recipes.schema import Config
from trainer.tasks import Task

SIZE = ("dit.width=1024", "dit.depth=8", "dit.hidden_width=4096", "latent_encoder.width=384")
RECIPE = (*SIZE, "lora.rank=32", "lora.alpha=32", "autoencode.global_batch=2", "autoencode.lr=1e-3")
GLOBAL_BATCH, LR, WARM, USUAL, SAVES, DURING, LOADS = 2, 1e-3, 3, 4, 5, 2, 3


class System(ABC):
    """A system that trains a module and can save and load its state."""

    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    trained = frozen = 0

    def task(self, config: Config) -> Task:
        """Make the task and count its trained and its frozen parameters."""
        task = task_of(config)
        self.trained = sum(value.numel() for value in task.learned.values())
        self.frozen = sum(value.numel() for value in task.module.parameters()) - self.trained
        return task

    @abstractmethod
    def __init__(self, config: Config) -> None: ...

    @abstractmethod
    def step(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor:
        """Train one step on this rank's samples; return their losses (b,) before the update."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Save to a new folder. Training stalls until this returns, though the files may be written later."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """Restore the state from a checkpoint."""

    def stall_seconds(self, call_seconds: float) -> float:
        """Seconds that training stalled for the last save, given those that the call of `save` took."""
        return call_seconds

    def settle(self, path: Path) -> None:
        """Wait until the last save is on the disk; by default by fsync of its files."""
        if self.rank == 0:
            for file in (file for file in path.rglob("*") if file.is_file()):
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        wait()

    def fingerprint(self) -> str | None:
        """Return a hash of the saved state that does not depend on the world size; None if the system has none."""
        return None


class Ours(System):
    """This project under one of its strategies."""

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
        self.saver.wait_for_copy()  # the loop waits here too, before the weights change
        self.strategy.step(LR, Gate(torch.zeros(()), NO_LIMIT))
        self.steps += 1
        self.ema.update(self.steps * GLOBAL_BATCH, GLOBAL_BATCH)
        return losses_B.detach()

    def save(self, path: Path) -> None:
        meta = {"steps": self.steps, "base": self.base}
        self.saver.save(int(path.name.removeprefix("step_")), self.state.owned(), meta)
        self.stalled_in_call = self.saver.waited_seconds

    def stall_seconds(self, call_seconds: float) -> float:
        return (
            call_seconds + self.saver.waited_seconds - self.stalled_in_call
        )  # a later step may have waited for the copy

    def settle(self, path: Path) -> None:
        self.saver.wait()

    def load(self, path: Path) -> None:
        """Load the newest whole checkpoint and verify its checksums, as the loop does."""
        from trainer.checkpoints import checkpoint

        newest = checkpoint.newest_on_all_ranks(path.parent)
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
    """Accelerate with DDP, or with DeepSpeed ZeRO and options for DeepSpeed's `save_checkpoint`."""

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
    """DeepSpeed's engine with its own checkpoints."""

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
    """Import and initialise DeepSpeed on gloo, without the shared-memory operator that it would compile."""
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


def slowest(seconds: float) -> float:
    """Return the largest value over all ranks."""
    value = torch.tensor(seconds, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def mean(losses_B: Tensor) -> float:
    """Return the mean loss of the global batch, over all ranks."""
    total = losses_B.double().sum()
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total) / GLOBAL_BATCH


class Training:
    """Trains a system on one batch after another and times each step."""

    def __init__(self, system: System, start: int = 0) -> None:
        self.system, self.seconds, self.samples = system, [0.0], start
        self.batches = batches(GLOBAL_BATCH, System.rank, System.world_size, start)

    def steps(self, count: int) -> list[float]:
        """Train `count` steps and return their losses; `seconds` has the time of each, on the slowest rank."""
        losses, self.seconds = [], []
        for _ in range(count):
            start = time.perf_counter()
            losses.append(mean(self.system.step(*next(self.batches))))
            self.seconds.append(slowest(time.perf_counter() - start))
            self.samples += GLOBAL_BATCH
        return losses


@contextmanager
def appearing(path: Path) -> Iterator[Callable[[], float]]:
    """Watch for a folder in a thread; the yielded function waits for it and returns its seconds from the start."""
    start, found = time.perf_counter(), [float("nan")]

    def look() -> None:
        while not path.exists():
            time.sleep(0.005)
        found[0] = time.perf_counter() - start

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield lambda: (thread.join(), found[0])[1]


def save(system: System, folder: Path) -> dict[str, Any]:
    """Measure saves with steps during the write, then loads, and compare the losses after a load with those before."""
    training, stalls, extra = Training(system), [], []
    training.steps(WARM)
    training.steps(USUAL)
    usual = statistics.median(training.seconds)
    seconds_on_disk = []
    for _ in range(SAVES):
        path = folder / f"step_{training.samples:012d}"
        fingerprint = system.fingerprint()
        clean_disk()
        with appearing(path) as seconds_until:
            start = time.perf_counter()
            system.save(path)
            call_seconds = time.perf_counter() - start
            losses, at = training.steps(DURING), training.samples - DURING * GLOBAL_BATCH
            stalls.append(slowest(system.stall_seconds(call_seconds)))
            extra.append(sum(training.seconds) - DURING * usual)
            if isinstance(system, Ours):
                system.settle(path)
                seconds_on_disk.append(seconds_until())
    if not isinstance(system, Ours):
        seconds_on_disk = [seconds_until_on_disk(system, folder / "whole") for _ in range(3)]
    loads = [load(system, path) for _ in range(LOADS)]
    same = _same(fingerprint, system.fingerprint())
    again = Training(system, at).steps(DURING)
    return {
        **{"path": str(path), "samples": at, "losses": losses, "fingerprint": fingerprint},
        **{"stall_s": stalls, "extra_s": extra, "whole_s": seconds_on_disk, "load_s": loads, "step_s": usual},
        **{"trained": system.trained, "frozen": system.frozen},
        **{"bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file())},
        **{"same": same, "departs": departure(losses, again)},
    }


def clean_disk() -> None:
    """Wait until everything that was written before is on the disk."""
    if System.rank == 0:
        os.sync()
    wait()


def seconds_until_on_disk(system: System, path: Path) -> float:
    """Measure the seconds until a peer's save is on the disk; peers do not call fsync, so `settle` does."""
    clean_disk()
    start = time.perf_counter()
    system.save(path)
    system.settle(path)
    seconds = slowest(time.perf_counter() - start)
    if System.rank == 0:
        shutil.rmtree(path)
    wait()
    return seconds


def load(system: System, path: Path) -> float:
    wait()
    start = time.perf_counter()
    system.load(path)
    return slowest(time.perf_counter() - start)


def half(system: System, folder: Path) -> dict[str, Any]:
    """Load a checkpoint that more ranks saved and train on; `saved.json` has the result of `save`."""
    saved = json.loads((folder / "saved.json").read_text())
    try:
        seconds = load(system, Path(saved["path"]))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    same = _same(saved["fingerprint"], system.fingerprint())
    losses = Training(system, saved["samples"]).steps(DURING)
    return {"load_s": seconds, "same": same, "departs": departure(saved["losses"], losses)}


def _same(before: str | None, after: str | None) -> bool | None:
    return before == after if before else None


def departure(before: list[float], after: list[float]) -> float:
    """Return the largest relative difference of losses; from the second loss on they depend on the moments too."""
    return max(abs(one - other) / abs(one) for one, other in zip(before, after, strict=True))


def main() -> None:
    name, action, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    config = recipe(folder.parent, *RECIPE, f"run_dir={folder}")
    systems = UNIVERSAL if action == "universal" else SYSTEMS
    result = (save if action == "save" else half)(systems[name](config), folder)
    if System.rank == 0:
        send_result(result)
    wait()
    sys.stdout.flush()
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(0)  # the process group's threads crash if the interpreter shuts down normally


if __name__ == "__main__":
    main()
