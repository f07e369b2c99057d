"""The one training loop. A stage is a Task; everything else is here, from top to bottom."""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint
from trainer.config import Config, TrainConfig, fingerprint, flatten
from trainer.data.stream import Batch, LatentStream, Shuffle
from trainer.ema import EMA
from trainer.held_out import Clips, HeldOutLoss
from trainer.metrics import LossSums, Metrics
from trainer.parallel import Parallel
from trainer.progress import Progress
from trainer.run import (
    RunDirectory,
    code_version,
    log_to,
    stage_folder,
    stage_inputs,
    training_sets,
)
from trainer.state import TrainState, export
from trainer.tasks import Task, make_task

logger = logging.getLogger("spresso")


def train(config: Config, stage: str, *, stop: Callable[[], bool] = lambda: False) -> str:
    """Train one stage to its end, from where it was left.

    Args:
        config: the whole recipe.
        stage: `pretrain`, `autoencode`, `quantize` or `finetune`.
        stop: asked at each step; when it says so on any rank, all ranks save together and leave.

    Returns:
        "done" or "stopped".

    Raises:
        ValueError: the run directory holds another run, or something that the stage builds on is missing.
    """
    settings = config.stage(stage)
    run = RunDirectory(stage_folder(config, stage), stage)

    # Where: ranks, device, precision.
    parallel = Parallel(config.parallel)
    log_to(run.path / "logs", parallel.rank)
    parts = parallel.parts(settings.global_batch)
    inputs = stage_inputs(config, stage)

    # What: the stage's model, the same initial weights on every rank, and the stream of global batches.
    torch.manual_seed(config.seed)
    task = make_task(config, stage)
    task.to(parallel.device)
    stream = _stream(config, settings, errors=run.path / "data_errors.jsonl")
    _require_autoencoder(task, stream)
    if parallel.main:
        run.claim(config, inputs)
    parallel.wait()

    # From where: the last whole checkpoint, or the beginning.
    resume = checkpoint.latest(run.checkpoints)
    if resume is None:
        task.initialise(_batches(stream, parallel), parallel.gather, parallel.main)
        parallel.broadcast(task.statistics.values())
        parallel.broadcast(task.learned.values())
    strategy = parallel.prepare(task.module, settings)
    values = {name: held.value.data for name, held in strategy.held().items()}
    ema = EMA(values, halflife=settings.ema_halflife, refresh=strategy.refresh)
    state = TrainState(task, strategy, ema, parallel)
    samples = steps = 0
    if resume is not None:
        resumed = state.load(resume)
        samples, steps = resumed["samples"], resumed["steps"]
        logger.info("%s: resumed from %s at %d samples", stage, resume.name, samples)

    metrics = Metrics(run, resumed_at=samples, sample_rate=task.autoencoder.sample_rate) if parallel.main else None
    clips = Clips(config, settings, parallel.device)
    held_out_loss = HeldOutLoss(config, settings, parallel)
    loss_sums = LossSums(config.log.bins, parallel.device)
    tick = _Tick(samples)
    saved_at = samples if resume else -1
    meta = {"stage": stage, "config": fingerprint(flatten(config)), "code": code_version(), **inputs}
    meta["strategy"] = config.parallel.strategy

    def save(**facts: Any) -> None:
        nonlocal saved_at
        if saved_at == samples:
            return
        checkpoint.save(run.checkpoints, samples, state.owned(), meta | {"steps": steps} | facts)
        checkpoint.prune(run.checkpoints, last=config.checkpoint.keep_last, every=config.checkpoint.keep_every)
        saved_at = samples

    def listen() -> None:
        with ema.applied():
            decoded = clips.decoded(task, strategy)
        for name, audio in decoded if metrics else []:
            metrics.listen(name, audio, samples)

    def measure() -> float:
        with ema.applied():
            loss = held_out_loss(strategy)
        if metrics:
            metrics.write("held_out", samples, loss=loss)
        return loss

    if metrics is not None and resume is None:
        for name, audio in clips.originals(task):
            metrics.listen(name, audio, 0)

    logger.info(
        "%s: %s learned weights of %s, %d samples in batches of %d, %s on %d rank(s)",
        stage,
        _millions(strategy.numel_learned),
        _millions(strategy.numel),
        settings.samples,
        settings.global_batch,
        config.parallel.strategy,
        parallel.world_size,
    )
    task.module.train()
    batches = stream.iterate(
        samples,
        rank=parallel.rank,
        world_size=parallel.world_size,
        local_ranks=parallel.local_ranks,
        parts=parts,
        threads=config.data.readers,
    )
    stopped = False
    with Progress(stage, total=settings.samples, unit="clips", shown=parallel.main) as progress:
        progress.to(samples)
        while samples < settings.samples and not stopped:
            # One global batch, cut into this rank's micro batches; gradients are reduced in the last.
            for part in range(parts):
                waiting = time.perf_counter()
                batch = next(batches)
                tick.data_wait += time.perf_counter() - waiting
                last = part == parts - 1
                with strategy.reducing(last=last):
                    mask = None if batch.mask is None else batch.mask.to(parallel.device)
                    x0_BCT, positions_B = batch.x0.to(parallel.device).float(), batch.positions.to(parallel.device)
                    losses_B, quantiles_B = strategy.forward(x0_BCT, positions_B, mask)
                    strategy.backward(losses_B.mean() / parts, last=last)
                loss_sums.add(losses_B.detach(), quantiles_B)

            # The step, its learning rate a pure function of samples seen.
            lr = learning_rate(settings, samples)
            grad_norm = strategy.step(lr, math.isfinite)
            before, samples, steps = samples, samples + settings.global_batch, steps + 1
            ema.update(samples, settings.global_batch)

            # What is due by samples seen: the log, listening samples, a checkpoint. Ranks agree on leaving.
            stopped = parallel.any(stop())
            last = samples >= settings.samples
            if _due(before, samples, config.log.every) or last:
                loss, by_bin = loss_sums.read(parallel)
                _require_finite(loss, stage, settings, samples)
                if metrics is not None:
                    metrics.write(
                        "train",
                        samples,
                        loss=loss,
                        loss_bins=by_bin,
                        lr=lr,
                        grad_norm=grad_norm,
                        **tick.read(samples),
                    )
                    run.write_status("running", samples=samples, of=settings.samples, loss=loss)
                progress.to(min(samples, settings.samples), loss=f"{loss:.4f}")
            if _due(before, samples, config.log.samples_every) and not last and not stopped:
                listen()
            if stopped:
                save()
            elif _due(before, samples, config.checkpoint.every) or last:
                _require_finite(grad_norm, stage, settings, samples)  # what is not would be saved for good
                save(held_out_loss=measure())

    batches.close()
    save()
    if stopped and samples < settings.samples:
        if parallel.main:
            run.write_status("stopped", samples=samples, of=settings.samples)
            logger.info("%s: stopped at %d samples, saved", stage, samples)
        _leave(metrics, parallel)
        return "stopped"

    # The end: listen, export the averaged weights, say so.
    listen()
    weights = state.averaged_weights()
    if parallel.main:
        exported = export(make_task(config, stage), weights, task.statistics, run.export)
        run.write_status("done", samples=samples, of=settings.samples, export=exported)
        logger.info("%s: done, exported to %s", stage, run.export)
    _leave(metrics, parallel)
    return "done"


def learning_rate(settings: TrainConfig, samples: int) -> float:
    """Linear warm-up, constant, linear decay to zero: a pure function of samples seen before the step."""
    rising = min(1.0, (samples + settings.global_batch) / settings.warmup) if settings.warmup else 1.0
    falling = settings.decay * settings.samples
    left = settings.samples - samples
    return settings.lr * rising * (min(1.0, left / falling) if falling else 1.0)


def _due(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` was passed; never where it is 0."""
    return every > 0 and now // every > before // every


def _require_finite(value: float, stage: str, settings: TrainConfig, samples: int) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"the loss of {stage} is no longer finite at {samples} samples: lower {stage}.lr (now {settings.lr:g}) "
            f"and start again in another run_dir; the last checkpoint is from before"
        )


def _stream(config: Config, settings: TrainConfig, *, errors: Path) -> LatentStream:
    data = config.data
    return LatentStream(
        training_sets(config),
        crop_frames=settings.crop_frames,
        global_batch=settings.global_batch,
        seed=config.seed,
        shuffle=Shuffle(data.shuffle, data.block, data.window, data.window_mib, data.lanes),
        buckets=data.buckets,
        errors=errors,
        max_damaged=data.max_damaged,
    )


def _require_autoencoder(task: Task, stream: LatentStream) -> None:
    made_by, ours, shards = stream.sets[0].info.ae_identity, task.autoencoder.identity(), stream.sets[0].location
    if made_by != ours:
        raise ValueError(
            f"the latents in {shards} are another autoencoder's ({made_by[:8]}, not {ours[:8]}): prepare "
            f"them with this recipe's, or give that autoencoder"
        )


def _batches(stream: LatentStream, parallel: Parallel) -> Iterator[Batch]:
    """This rank's part of one global batch after another, from the beginning."""
    for step in itertools.count():
        yield stream.batch(step * stream.global_batch, rank=parallel.rank, world_size=parallel.world_size)


def _leave(metrics: Metrics | None, parallel: Parallel) -> None:
    if metrics is not None:
        metrics.close()
    parallel.wait()


def _millions(numbers: int) -> str:
    return f"{numbers / 1e6:.2f} M"


@dataclass
class _Tick:
    """Time since the last line of the log."""

    samples: int
    data_wait: float = 0.0

    def __post_init__(self) -> None:
        self.start = time.perf_counter()

    def read(self, samples: int) -> dict[str, Any]:
        """Samples a second and the share of time spent waiting for data; starts anew."""
        seconds = time.perf_counter() - self.start
        facts = {
            "samples_per_second": round((samples - self.samples) / seconds, 2),
            "data_wait": round(self.data_wait / seconds, 4),
            "host": os.uname().nodename,
        }
        self.samples, self.data_wait, self.start = samples, 0.0, time.perf_counter()
        return facts
