"""The one training loop. A stage is a Task; everything else is here, from top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import torch

from trainer.checkpoints import checkpoint, resume
from trainer.checkpoints.ema import EMA
from trainer.checkpoints.saver import Saver
from trainer.checkpoints.state import TrainState, fill_task
from trainer.feed import Feed
from trainer.health import Health
from trainer.log.training_log import TrainingLog
from trainer.memory.estimate import out_of_memory
from trainer.ranks import collective
from trainer.ranks.parallel import Parallel
from trainer.ranks.watchdog import Watchdog, collective_timeout
from trainer.recipes.schema import Config, TrainConfig
from trainer.run_directory import RunDirectory, code_version, log_to, stage_folder, stage_inputs
from trainer.stop import Stop
from trainer.tasks import make_task

logger = logging.getLogger("spresso")

_MARGIN = 1.5  # times the last save's seconds are what the next may take


def train(config: Config, stage: str, *, stop: Stop | None = None, permitted: Callable[[], None] = lambda: None) -> str:
    """Train one stage to its end, from where it was left.

    Args:
        config: the whole recipe.
        stage: `pretrain`, `autoencode`, `quantize`, `prior` or `finetune`.
        stop: asked at each step, and between the parts of what takes longer; when it says so on any rank, all ranks
            save together and leave.
        permitted: raises on rank 0 where this run may no longer write, as another start of it has taken over.

    Returns:
        "done" or "stopped".

    Raises:
        ValueError: the run directory holds another run, something that the stage builds on is missing, the training
            comes to nothing, or the device has too little memory; says what mends it.
        OSError: a checkpoint could not be written; the older ones are untouched.
    """
    settings, health_settings, stop = config.stage(stage), config.health, stop or Stop()
    run = RunDirectory(stage_folder(config, stage), stage, permitted=permitted)

    # Where: ranks, device, precision.
    timeout = collective_timeout(health_settings.hang_seconds)
    parallel = Parallel(config.parallel, timeout=timeout)
    log = run.path / "logs" / f"rank_{parallel.rank}.log"
    log_to(log, show=parallel.main)
    with Watchdog(log, health_settings.hang_seconds) as watchdog, _failures_told(config, stage, parallel, watchdog):
        feed = Feed(config, settings, parallel, errors=run.path / "data_errors.jsonl", stop=stop)
        inputs = stage_inputs(config, stage)
        identity = run.identity(config, inputs)

        # What: the stage's model, the same initial weights on every rank.
        torch.manual_seed(config.seed)
        task = make_task(config, stage)
        task.to(parallel.device)
        feed.require(task)
        collective.require_alike("the base model", task.base_hash)
        if parallel.main:
            run.claim(config, inputs)
        parallel.wait()

        # From where: a checkpoint, other weights, or the beginning.
        source = resume.find_start(config, run, identity)
        if source is None:
            task.initialise(feed.from_the_beginning(), parallel.gather, parallel.main)
            if config.checkpoint.start_from is not None:
                resume.start(task, config.checkpoint.start_from)
            parallel.broadcast(task.statistics.values())
            parallel.broadcast(task.learned.values())
        strategy = parallel.prepare(task.module, settings)
        parallel.give_up_after(timeout)
        values = {name: held.value.data for name, held in strategy.held().items()}
        ema = EMA(values, halflife=settings.ema_halflife, refresh=strategy.refresh)
        state = TrainState(task, strategy, ema, parallel)
        health = Health(health_settings, scaled=config.parallel.precision == "fp16")
        samples = steps = passed_over = 0
        unsaved = False
        if source is not None:
            meta = state.load(source)
            samples, steps, passed_over = meta["samples"], meta["steps"], meta.get("passed_over", 0)
            unsaved = meta.get("unsaved", False)
            health.restore(meta.get("health"))
            logger.info(
                "%s: %s",
                stage,
                resume.describe_resumed(
                    source,
                    strategy=config.parallel.strategy,
                    world_size=parallel.world_size,
                    base_hash=task.base_hash,
                ),
            )

        saved_at = -1
        facts = {"stage": stage, "run": str(run.path.absolute()), "config": identity, "base": task.base_hash}
        facts |= {"strategy": config.parallel.strategy, "code": code_version(), **inputs}

        with (
            Saver(run.checkpoints, config.checkpoint, permitted=permitted) as saver,
            TrainingLog(config, run, task, strategy, ema, parallel, stop) as report,
            closing(feed),
        ):

            def save(**more: float) -> None:
                # Good is what was due, in good health. A stop's save is not: a run would go back to where it stopped.
                nonlocal saved_at, unsaved
                if saved_at != samples:
                    good = unsaved and health.good
                    unsaved = unsaved and not good
                    counts = {"steps": steps, "passed_over": passed_over, "health": health.state()}
                    counts |= {"good": good, "unsaved": unsaved}
                    saver.save(samples, state.owned(), facts | counts | more)
                    saved_at = samples

            def go_back() -> tuple[int, int, int]:
                """To the last good checkpoint: samples and steps of then, and how much of the stream is passed over."""
                nonlocal saved_at
                saver.wait()
                good = checkpoint.latest(run.checkpoints, wanted=lambda meta: meta.get("good", True))
                if good is None or health.rewinds >= health_settings.max_rewinds:
                    raise ValueError(_hopeless(health, stage, settings, samples, start_only=good is None))
                saved_at = -1
                later = [path for path in checkpoint.checkpoints(run.checkpoints) if path.name > good.name]
                collective.on_rank_0(lambda: checkpoint.discard(later))
                then, position, times = state.load(good), samples + passed_over, health.rewinds
                health.restore(then.get("health"))
                health.rewound(times)
                feed.begin(position)
                report.went_back(then["samples"], position, health, from_=samples, to=good.name)
                return then["samples"], then["steps"], position - then["samples"]

            logger.info(
                "%s: %s learned weights of %s, %d samples in batches of %d, %s on %d rank(s)",
                *(stage, _millions(strategy.numel_learned), _millions(strategy.numel), settings.samples),
                *(settings.global_batch, config.parallel.strategy, parallel.world_size),
            )
            report.begin(samples, fresh=source is None)
            if source is not None and source in checkpoint.checkpoints(run.checkpoints):
                saved_at = samples
            elif source is not None:  # another run's: from here on it is this one's
                unsaved = True
                save()
            task.module.train()
            feed.begin(samples + passed_over)
            saver.took = run.status.get("save_seconds", 0.0)
            stopping = False
            while samples < settings.samples and not stopping:
                # One global batch, cut into this rank's micro batches; gradients are reduced in the last.
                strategy.scale = health.scale
                batch_loss = torch.zeros((), dtype=torch.float64, device=parallel.device)
                report.clock.begin()
                for part in range(feed.parts):
                    batch, last = feed.next(), part == feed.parts - 1
                    with strategy.reducing(last=last):
                        mask = None if batch.mask is None else batch.mask.to(parallel.device)
                        x0_BCT, positions_B = batch.x0.to(parallel.device).float(), batch.positions.to(parallel.device)
                        text = None if batch.text is None else batch.text.to(parallel.device)
                        losses_B, quantiles_B = strategy.forward(x0_BCT, positions_B, mask, text)
                        report.losses.add(losses_B.detach(), quantiles_B)
                        batch_loss += losses_B.detach().double().sum()
                        if last:
                            report.clock.computed()
                            # What all ranks have to know: the loss, who is to leave or has no batch, whose save failed
                            agreed = parallel.agree(batch_loss, stop(), feed.gave_up, saver.failed)
                        strategy.backward(losses_B.mean() / feed.parts, last=last)
                loss_sum, (stopping, void, failed) = agreed()
                if failed:
                    saver.wait()  # raises
                if void:
                    break

                # The step, if it is a sound one; its learning rate a pure function of samples seen.
                saver.copied()
                loss, lr = loss_sum / settings.global_batch, learning_rate(settings, samples)
                grad_norm = strategy.step(lr, lambda norm: health.accepts(samples, loss, norm))  # noqa: B023
                report.step(samples, health, feed, samples + passed_over)
                before, samples, steps = samples, samples + settings.global_batch, steps + health.taken
                ema.update(samples, settings.global_batch)
                watchdog.beat()
                if health.hopeless:
                    with watchdog.patient():
                        samples, steps, passed_over = go_back()
                    continue

                # What is due by samples seen: a line of the log, listening samples, a checkpoint.
                ended = samples >= settings.samples
                if _due(before, samples, config.log.every) or ended:
                    report.line(samples, lr=lr, grad_norm=grad_norm, feed=feed, saver=saver)
                if _due(before, samples, config.log.samples_every) and not (ended or stopping):
                    with watchdog.patient():
                        stopping = not report.listen(samples)
                unsaved = unsaved or _due(before, samples, config.checkpoint.every) or ended
                if unsaved and not stopping and health.good:
                    with watchdog.patient():
                        held_out_loss = report.measure(samples)
                        stopping = held_out_loss is None
                        if held_out_loss is not None:
                            save(held_out_loss=held_out_loss)

            # The end: all of it saved; listen, export the averaged weights, say so.
            with watchdog.patient():
                if not parallel.any(stop.hurried(_MARGIN * saver.took)):
                    save()
                saver.wait()
                if samples < settings.samples or not report.listen(samples):
                    strategy.close()
                    if parallel.main:
                        report.stopped(samples, saved=saved_at == samples, took=saver.took)
                    parallel.wait()
                    return "stopped"
                weights = state.averaged_weights()
                strategy.close()
                if parallel.main:
                    finished = fill_task(make_task(config, stage), weights, task.statistics)
                    finished.finish(feed.from_the_beginning(whole=True), parallel.device)
                    exported = finished.export(run.export)
                    run.write_status("done", samples=samples, of=settings.samples, export=exported)
                    logger.info("%s: done, exported to %s", stage, run.export)
                parallel.wait()
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


def _hopeless(health: Health, stage: str, settings: TrainConfig, samples: int, *, start_only: bool) -> str:
    why = health.skipped[-1]["why"]
    gone_back = f", after going back {health.rewinds} times" if health.rewinds else ""
    gone_back += ", and there is no checkpoint to go back to" if start_only else ""
    return (
        f"{stage} comes to nothing at {samples} samples: {len(health.skipped)} steps in a row were skipped{gone_back}, "
        f"the last because {why}: lower {stage}.lr (now {settings.lr:g}) and start again in another run_dir; "
        f"incident.json names the samples"
    )


@contextmanager
def _failures_told(config: Config, stage: str, parallel: Parallel, watchdog: Watchdog) -> Iterator[None]:
    """All of them in this rank's log; what does not fit into memory is explained."""
    try:
        yield
    except Exception as error:
        with (
            watchdog.patient()
        ):  # where one rank's clock ends it, the next one's is not to cut off what it says of that
            told = _told(error, config, stage, parallel)
        if told is None:
            raise
        raise ValueError(told) from error


def _told(error: Exception, config: Config, stage: str, parallel: Parallel) -> str | None:
    """Log a failure; returns what explains it better than it does itself, if anything does."""
    if isinstance(error, ValueError | OSError):
        logger.error("%s: %s", stage, error)
        return None
    if not (isinstance(error, RuntimeError) and _out_of_memory(error)):
        logger.exception("%s: rank %d failed", stage, parallel.rank)
        return None
    peak, total = parallel.memory()
    told = out_of_memory(config, stage, parallel.world_size, peak, total)
    logger.error("%s: %s\n%s", stage, error, told)
    return told


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _millions(numbers: int) -> str:
    return f"{numbers / 1e6:.2f} M"
