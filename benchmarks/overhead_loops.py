"""One side of a benchmark as a rank: python overhead_loops.py ours|plain|tracked|untracked STRATEGY FOLDER ADDRESS.

`ours` is the real loop; `plain` is a hand-written loop for the same module, batches and settings; `tracked` is the real
loop with all trackers, and `untracked` with none. Each passes a gate once
per step, between the backward pass and the optimizer's step, where the gate makes all but one wait for their turn.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from subject import STAGE, LossOnly, recipe
from torch import Tensor, nn

from trainer.log.trackers.events import Event
from trainer.log.trackers.fan_out import Trackers
from trainer.recipes.schema import Config
from trainer.stop import Stop

SIZE = ("dit.width=384", "dit.depth=4", "dit.hidden_width=1536", "latent_encoder.width=256", "lora.rank=16")
GLOBAL_BATCH = 16
BLOCK = 20  # steps per line of the log, as in the demo
RECIPE = (
    *SIZE,
    f"autoencode.global_batch={GLOBAL_BATCH}",
    "autoencode.samples=100000000",
    f"log.every={GLOBAL_BATCH * BLOCK}",
    "log.samples_every=0",
    "checkpoint.every=1000000000",
)
TRACKED = {
    "tracked": ("log.trackers=[tensorboard,wandb,mlflow,trackio]", "log.prometheus=${run_dir}/run.prom"),
    "untracked": ("log.trackers=[]",),
}
PRELOADED = 16
Step = Callable[[Tensor, Tensor], None]


class Gate(Stop):
    """Lets as many steps pass as `overhead.py` asks for, then sends the seconds of each as in `_now`, and waits."""

    def __init__(self, address: str, trackers: TrackerSeconds | None = None) -> None:
        self.connection, self.trackers = Client(address), trackers
        self.left, self.last, self.taken = 0, (0.0, 0.0, 0.0), list[tuple[float, ...]]()

    def __call__(self) -> bool:
        """Wait if the turn is over. Always returns False, as the process exits here once 0 steps are requested."""
        now = self._now()
        self.taken.append(tuple(after - before for after, before in zip(now, self.last, strict=True)))
        if not self.left:
            self.connection.send(self.taken)
            self.left, self.taken = self.connection.recv(), []
            if not self.left:
                os._exit(0)
            now = self._now()
        self.left, self.last = self.left - 1, now
        return False

    def _now(self) -> tuple[float, float, float]:
        """Return the clock's seconds, the CPU seconds of all threads of this process, and those of its trackers."""
        return time.perf_counter(), time.process_time(), self.trackers() if self.trackers else 0.0


class TrackerSeconds:
    """Counts the CPU seconds of this process that its trackers take, in the training thread and in their own."""

    def __init__(self) -> None:
        self._threads, self._ended, self._putting = set[threading.Thread](), 0.0, 0.0
        self._watch_threads()
        put = Trackers.put

        def counted(trackers: Trackers, event: Event) -> None:
            begun = time.thread_time()
            put(trackers, event)
            self._putting += time.thread_time() - begun

        Trackers.put = counted  # type: ignore[method-assign]

    def _watch_threads(self) -> None:
        start = threading.Thread.start

        def watched(thread: threading.Thread) -> None:
            if thread.name.startswith("tracker ") or threading.current_thread() in self._threads:
                self._threads.add(thread)
                thread.run = partial(self._run, thread, thread.run)  # type: ignore[method-assign]
            start(thread)

        threading.Thread.start = watched  # type: ignore[method-assign]

    def _run(self, thread: threading.Thread, run: Callable[[], None]) -> None:
        try:
            run()
        finally:
            self._threads.discard(thread)
            self._ended += time.thread_time()

    def __call__(self) -> float:
        living = [thread.native_id for thread in list(self._threads) if thread.native_id is not None]
        return self._putting + self._ended + sum(map(_thread_seconds, living))


def _thread_seconds(native_id: int) -> float:
    """Return the CPU seconds of a thread that may have ended; Linux makes its clock from its number."""
    try:
        return time.clock_gettime(~native_id << 3 | 6)
    except OSError:
        return 0.0


def ours(config: Config, gate: Gate) -> None:
    from trainer.loop import train

    train(config, STAGE, stop=gate)


def plain(config: Config, gate: Gate) -> None:
    from trainer.tasks import make_task

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(config.seed)
    module = LossOnly(make_task(config, STAGE).module)
    strategy = config.parallel.strategy
    step = PLAIN[strategy](module, config, gate)
    for x0_BCT, positions_B in cycle(preloaded(config)):
        step(x0_BCT, positions_B)


def preloaded(config: Config) -> list[tuple[Tensor, Tensor]]:
    """Load the first batches of the real loop's stream into memory as float32."""
    from trainer.data.stream import LatentStream
    from trainer.stage_inputs import training_sets

    settings = config.stage(STAGE)
    stream = LatentStream(training_sets(config), crop_frames=settings.crop_frames, global_batch=GLOBAL_BATCH, seed=0)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    starts = islice(range(0, 10**9, GLOBAL_BATCH), PRELOADED)
    found = [stream.batch(start, rank=rank, world_size=world_size) for start in starts]
    return [(batch.x0.float(), batch.positions) for batch in found]


def plain_ddp(module: nn.Module, config: Config, gate: Gate) -> Step:
    model = nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)
    return _torch_step(model, config, gate)


def plain_fsdp2(module: nn.Module, config: Config, gate: Gate) -> Step:
    """Shard each block and the root; the frozen base is replicated on every rank, as in the real loop."""
    from torch.distributed.fsdp import fully_shard

    frozen = {value for value in module.parameters() if not value.requires_grad}
    for block in blocks(module):
        fully_shard(block, ignored_params=frozen)
    return _torch_step(fully_shard(module, ignored_params=frozen), config, gate)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and name.endswith("blocks"):
            yield from part


def _torch_step(model: nn.Module, config: Config, gate: Gate) -> Step:
    optimizer = adamw(model, config)
    parameters = [value for value in model.parameters() if value.requires_grad]
    average = averaging([getattr(value, "_local_tensor", value.data) for value in parameters])

    def step(x0_BCT: Tensor, positions_B: Tensor) -> None:
        model(x0_BCT, positions_B).mean().backward()
        gate()
        nn.utils.clip_grad_norm_(parameters, config.stage(STAGE).clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        average()

    return step


def plain_zero(module: nn.Module, config: Config, gate: Gate, *, stage: int) -> Step:
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    trained = sum(value.numel() for value in module.parameters() if value.requires_grad)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.stage(STAGE).clip_norm,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": trained,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
    }
    engine, optimizer, *_ = deepspeed.initialize(model=module, optimizer=adamw(module, config), config=settings)
    masters = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    average = averaging([master.data for master in masters])

    def step(x0_BCT: Tensor, positions_B: Tensor) -> None:
        engine.backward(engine(x0_BCT, positions_B).mean())
        gate()
        engine.step()
        average()

    return step


PLAIN: dict[str, Callable[[nn.Module, Config, Gate], Step]] = {
    "ddp": plain_ddp,
    "zero1": lambda *arguments: plain_zero(*arguments, stage=1),
    "zero2": lambda *arguments: plain_zero(*arguments, stage=2),
    "zero3": lambda *arguments: plain_zero(*arguments, stage=3),
    "fsdp2": plain_fsdp2,
}


def adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Make AdamW with weight decay on matrices only, as the real loop does."""
    settings = config.stage(STAGE)
    trained = [value for value in model.parameters() if value.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [value for value in trained if value.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [value for value in trained if value.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.betas[0], settings.betas[1]), fused=True)


def averaging(values: list[Tensor]) -> Callable[[], None]:
    """Return a function that updates a moving average of the values."""
    averages = [value.clone() for value in values]
    return lambda: torch._foreach_lerp_(averages, values, 0.01)


def main() -> None:
    side, strategy, folder, address = sys.argv[1:]
    name = f"{strategy}-{side}" if side in TRACKED else strategy
    settings = (f"parallel.strategy={strategy}", f"run_dir={folder}/{name}", *TRACKED.get(side, ()))
    config = recipe(Path(folder), *RECIPE, *settings)
    (plain if side == "plain" else ours)(config, Gate(address, TrackerSeconds() if side == "tracked" else None))


if __name__ == "__main__":
    main()
