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
from torch import Tensor

from trainer import checkpoint
from trainer.config import Config, TrainConfig, fingerprint, flatten
from trainer.data.stream import Batch, LatentStream, Shuffle
from trainer.ema import EMA
from trainer.metrics import LossSums, Metrics
from trainer.parallel import Parallel
from trainer.progress import Progress
from trainer.run import (
    RunDirectory,
    code_version,
    held_out_set,
    log_to,
    stage_folder,
    stage_inputs,
    training_sets,
)
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
    learned = task.learned
    module = parallel.prepare(task.module)
    optimizer = _optimizer(learned, settings)
    ema = EMA(learned, halflife=settings.ema_halflife)
    samples = steps = 0
    if resume is not None:
        resumed = checkpoint.load(resume, checkpoint.whole_ranges(_state(task, optimizer, ema)))
        samples, steps = resumed["samples"], resumed["steps"]
        _set_steps(optimizer, steps)
        logger.info("%s: resumed from %s at %d samples", stage, resume.name, samples)

    metrics = Metrics(run, resumed_at=samples, sample_rate=task.autoencoder.sample_rate) if parallel.main else None
    clips = _Clips(config, settings, task, parallel.device) if metrics else None
    loss_sums = LossSums(config.log.bins, parallel.device)
    tick = _Tick(samples)
    saved_at = samples if resume else -1
    meta = {"stage": stage, "config": fingerprint(flatten(config)), "code": code_version(), **inputs}

    def save() -> None:
        nonlocal saved_at
        if saved_at == samples:
            return
        checkpoint.save(
            run.checkpoints,
            samples,
            checkpoint.equal_ranges(_state(task, optimizer, ema), rank=parallel.rank, world_size=parallel.world_size),
            meta | {"steps": steps},
        )
        checkpoint.prune(run.checkpoints, last=config.checkpoint.keep_last, every=config.checkpoint.keep_every)
        saved_at = samples

    def listen() -> None:
        if metrics is None or clips is None:
            return
        with ema.applied():
            for name, audio in clips.decoded(task):
                metrics.listen(name, audio, samples)

    if clips is not None and metrics is not None and resume is None:
        for name, audio in clips.originals(task):
            metrics.listen(name, audio, 0)

    logger.info(
        "%s: %s learned weights of %s, %d samples in batches of %d on %d rank(s)",
        stage,
        _millions(learned.values()),
        _millions(task.module.parameters()),
        settings.samples,
        settings.global_batch,
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
            optimizer.zero_grad(set_to_none=True)
            for part in range(parts):
                waiting = time.perf_counter()
                batch = next(batches)
                tick.data_wait += time.perf_counter() - waiting
                with parallel.reduce_at(module, last=part == parts - 1), parallel.accelerator.autocast():
                    mask = None if batch.mask is None else batch.mask.to(parallel.device)
                    result = module(batch.x0.to(parallel.device).float(), batch.positions.to(parallel.device), mask)
                    parallel.backward(result.losses.mean() / parts)
                loss_sums.add(result.losses.detach(), result.quantiles)

            # The step, its learning rate a pure function of samples seen.
            grad_norm = parallel.clip(learned.values(), settings.clip_norm)
            lr = learning_rate(settings, samples)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
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
                        grad_norm=float(grad_norm),
                        **tick.read(samples),
                    )
                    run.write_status("running", samples=samples, of=settings.samples, loss=loss)
                progress.to(min(samples, settings.samples), loss=f"{loss:.4f}")
            if _due(before, samples, config.log.samples_every) and not last and not stopped:
                listen()
            if _due(before, samples, config.checkpoint.every) or stopped:
                _require_finite(float(grad_norm), stage, settings, samples)  # what is not would be saved for good
                save()

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
    if parallel.main:
        with ema.applied():
            exported = task.export(run.export)
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


def _optimizer(learned: dict[str, torch.nn.Parameter], settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW with its state made at once, so that a checkpoint has where to load to."""
    matrices = [value for value in learned.values() if value.ndim > 1]
    vectors = [value for value in learned.values() if value.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        fused=True,
    )
    for parameter in learned.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(steps)


def _state(task: Task, optimizer: torch.optim.Optimizer, ema: EMA) -> dict[str, Tensor]:
    """Everything a checkpoint holds, under plain names; the tensors themselves, so that a load fills them in place.

    Asked for anew at each load and save: DDP and `Module.to` may give a parameter another storage.
    """
    state = {f"statistics/{name}": value for name, value in task.statistics.items()}
    for name, parameter in task.learned.items():
        state[f"param/{name}"] = parameter.data
        state[f"ema/{name}"] = ema.averages[name]
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    return state


def _leave(metrics: Metrics | None, parallel: Parallel) -> None:
    if metrics is not None:
        metrics.close()
    parallel.wait()


def _millions(tensors: Any) -> str:
    return f"{sum(tensor.numel() for tensor in tensors) / 1e6:.2f} M"


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


class _Clips:
    """A few held-out clips, always the same, that the log listens to."""

    def __init__(self, config: Config, settings: TrainConfig, task: Task, device: torch.device) -> None:
        shards = held_out_set(config)
        count = min(config.log.clips, len(shards))
        self.ids = [round(index * (len(shards) - 1) / max(1, count - 1)) for index in range(count)]
        latents = shards.latents(self.ids)
        unit = math.lcm(config.latent_encoder.pooling, config.dit.patch_size)
        frames = min(settings.crop_frames, min(x0_CT.shape[1] for x0_CT in latents) // unit * unit)
        self.x0_BCT = torch.stack([torch.tensor(x0_CT[:, :frames]) for x0_CT in latents]).float().to(device)

    def originals(self, task: Task) -> list[tuple[str, Tensor]]:
        """What the AudioAE makes of the clips: the ceiling."""
        return self._named("original", task.autoencoder.decode(self.x0_BCT))

    @torch.no_grad()
    def decoded(self, task: Task) -> list[tuple[str, Tensor]]:
        """What the model makes of them."""
        task.module.eval()
        audio = task.sample(self.x0_BCT, seeds=self.ids)
        task.module.train()
        return self._named("decoded", audio)

    def _named(self, kind: str, audio_B1S: Tensor) -> list[tuple[str, Tensor]]:
        return [(f"clip_{id_}/{kind}", audio[0]) for id_, audio in zip(self.ids, audio_B1S, strict=True)]
