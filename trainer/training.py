"""What surrounds the training loop: setting a stage's training up, rewinding it to a checkpoint, and finishing it.

`trainer.loop` holds the loop itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainer import formulation
from trainer.checkpoints import checkpoint, resume, snapshots
from trainer.checkpoints.ema import EMA
from trainer.checkpoints.names import checkpoints, samples_of
from trainer.checkpoints.saver import Saver
from trainer.checkpoints.state import TrainState, fill_task
from trainer.choose_average import Tried, choose_average, chosen
from trainer.failures import explained_failures, hopeless_run
from trainer.feed import Feed
from trainer.health import Health
from trainer.log.log_file import logging_to
from trainer.log.step_tracer import StepTracer
from trainer.log.training_log import TrainingLog
from trainer.memory.snapshot import memory_history
from trainer.provenance import code_version
from trainer.ranks import collective
from trainer.ranks.allocator import prepare_allocator
from trainer.ranks.parallel import Parallel
from trainer.ranks.readback import Readback
from trainer.ranks.strategy import Strategy
from trainer.ranks.watchdog import Watchdog, collective_timeout, prepare_nccl
from trainer.recipes.schema import Config, TrainConfig
from trainer.reporter import StatusReporter
from trainer.run_directory import RunDirectory, stage_folder
from trainer.schedule import lengthened_intervals
from trainer.stage_inputs import stage_inputs
from trainer.stop import Stop
from trainer.stores.uploads import Uploads
from trainer.tasks import Task, make_task

logger = logging.getLogger(__name__)

_SAVE_MARGIN = 1.5  # the next save may take this many times as long as the last one


class PendingStep(NamedTuple):
    """A step that the device may still be computing."""

    before: int
    """Samples seen before the step."""
    position: int
    """Position in the stream at which the step's batch begins."""
    figures: Readback
    """The mean loss of the global batch, and its gradient norm before clipping."""


@dataclass
class Training:
    """Everything that the loop uses. Ranks differ only in their part of the batch and of the weights."""

    config: Config
    settings: TrainConfig
    run: RunDirectory
    parallel: Parallel
    watchdog: Watchdog
    feed: Feed
    task: Task
    strategy: Strategy
    ema: EMA
    health: Health
    state: TrainState
    saver: Saver
    uploads: Uploads
    log: TrainingLog
    tracer: StepTracer
    stop: Stop
    facts: dict[str, Any]
    """Metadata of the run that every checkpoint stores: stage, hashes, strategy, code version."""
    stopping: bool = False
    """Whether any rank was asked to stop. All ranks set it at the same step."""
    pending: PendingStep | None = None
    """The last step, if the host has not read yet whether it was taken."""
    grad_norm: float = math.nan
    """Gradient norm of the last step that was read, before clipping."""

    @property
    def ended(self) -> bool:
        """Whether the run has seen all samples of the stage."""
        return self.state.samples >= self.settings.samples

    def settle(self) -> None:
        """Record whether the pending step was taken, once the device has computed its loss and gradient norm."""
        if self.pending is None:
            return
        samples, position, figures = self.pending
        self.pending = None
        loss, self.grad_norm = figures.read()
        self.state.steps += self.health.record(samples, loss, self.grad_norm)
        self.log.step(samples, self.health, self.feed, position)

    def save(self, **figures: float) -> None:
        """Start saving a checkpoint, unless the last one was saved at this sample count. All ranks.

        `figures` are added to the checkpoint's metadata.
        """
        if self.state.saved_at != self.state.samples:
            meta = self.facts | self.state.next_meta() | figures
            self.saver.save(self.state.samples, self.state.owned(), meta)

    def save_snapshot(self) -> None:
        """Start saving a snapshot of the two averages. All ranks."""
        self.saver.save_snapshot(
            self.run.averages,
            self.state.samples,
            self.state.owned_averages(),
            self.facts,
            every=snapshots.interval(self.settings),
        )
        self.saver.wait_for_copy()  # a held-out loss at the same step swaps the averages and the weights


@contextmanager
def set_up(config: Config, stage: str, stop: Stop, require_ownership: Callable[[], None]) -> Iterator[Training]:
    """Build everything that a stage's training needs, and resume from a checkpoint if there is one. All ranks.

    Args:
        config: the whole recipe.
        stage: the name of a trained stage.
        stop: polled at each step.
        require_ownership: called on rank 0 before each write; raises if a later start of this run has taken over.

    Raises:
        ValueError, OSError: see `trainer.loop.train`.
    """
    settings = config.stage(stage)
    run = RunDirectory(stage_folder(config, stage), stage, require_ownership=require_ownership)

    # Join the process group. From here on, every failure is written to this rank's log.
    prepare_allocator()
    prepare_nccl(config.health.hang_seconds)
    timeout = collective_timeout(config.health.hang_seconds)
    parallel = Parallel(config.parallel, timeout=timeout)
    log_file = run.path / "logs" / f"rank_{parallel.rank}.log"
    with (
        logging_to(log_file, show=parallel.main),
        Uploads(config, stage, stop, main=parallel.main) as uploads,  # waits at its end, when no watchdog runs
        Watchdog(log_file, config.health.hang_seconds) as watchdog,
        memory_history(parallel.device, config.log.memory_history),
        explained_failures(config, stage, parallel, watchdog, logs=log_file.parent),
    ):
        # Open the data, and build the stage's model with the same initial weights on every rank.
        feed = Feed(config, settings, parallel, errors=run.path / "data_errors.jsonl", stop=stop)
        inputs = stage_inputs(config, stage)
        identity = run.identity(config, inputs)
        older = {run.identity(config, inputs, with_paths=True, zero_clip=zero_clip) for zero_clip in (False, True)}
        task = _task_of_ranks(config, stage, feed, parallel)

        # Claim the run directory, and find the checkpoint to resume from.
        if parallel.main:
            resume.require_own_settings(run, {identity, *older})
            run.claim(config, inputs)
        parallel.wait()
        source = resume.find_start(config, run, {identity, *older})
        if parallel.main:
            task.reporter = StatusReporter(run, of=settings.samples)
        if source is None:
            _start_weights(task, config, feed, parallel)

        # Shard the model among the ranks, and load each rank's part of the checkpoint.
        state = _sharded_state(task, config, parallel)
        parallel.give_up_after(timeout)
        if source is not None:
            state.load(source)
            logger.info("%s: %s", stage, collective.on_rank_0(lambda: _resumed(source, config, parallel, task)))

        with (
            Saver(
                run.checkpoints,
                config.checkpoint,
                require_ownership=require_ownership,
                hand_over=uploads.checkpoint,
            ) as saver,
            TrainingLog(config, run, task, state.strategy, state.ema, parallel, stop) as log,
            closing(feed),
            closing(
                StepTracer(run, parallel.device, watchdog, main=parallel.main, at_start=config.log.profile_steps)
            ) as tracer,
        ):
            training = Training(
                config=config,
                settings=settings,
                run=run,
                parallel=parallel,
                watchdog=watchdog,
                feed=feed,
                task=task,
                strategy=state.strategy,
                ema=state.ema,
                health=state.health,
                state=state,
                saver=saver,
                uploads=uploads,
                log=log,
                tracer=tracer,
                stop=stop,
                facts=_facts(config, run, identity, task, inputs),
            )
            _begin(training, source)
            yield training


def _task_of_ranks(config: Config, stage: str, feed: Feed, parallel: Parallel) -> Task:
    """Build the stage's Task for the data of `feed`, with the same initial weights on every rank. All ranks."""
    torch.manual_seed(config.seed)
    task = make_task(config, stage)
    task.to(parallel.device)
    feed.require(task)
    collective.require_alike("the base model", task.base_hash)
    return task


def _sharded_state(task: Task, config: Config, parallel: Parallel) -> TrainState:
    """Put the task's module under the recipe's strategy, and return the state before the first sample. All ranks."""
    settings = config.stage(task.stage)
    strategy = parallel.prepare(task.module, settings)
    values = {name: held.value.data for name, held in strategy.held().items()}
    profiles = settings.ema_profiles
    ema = EMA(values, halflife=settings.ema_halflife, profiles=profiles, refresh=strategy.refresh)
    health = Health(config.health, scaled=config.parallel.precision == "fp16")
    return TrainState(task, strategy, ema, health, parallel)


def _facts(config: Config, run: RunDirectory, identity: str, task: Task, inputs: dict[str, str]) -> dict[str, Any]:
    """Return what each checkpoint says of where it comes from."""
    return {
        "stage": run.stage,
        "run": str(run.path.absolute()),
        "config": identity,
        "base": task.base_hash,
        "strategy": config.parallel.strategy,
        "code": code_version(),
        **inputs,
        "formulation": formulation.of_recipe(config),
    }


def _start_weights(task: Task, config: Config, feed: Feed, parallel: Parallel) -> None:
    """Initialise the weights of a fresh run, the same on all ranks."""
    whole = feed.from_the_beginning(whole=True) if parallel.main else None
    task.initialise(feed.from_the_beginning(), parallel.gather, whole)
    if config.checkpoint.start_from is not None:
        resume.start(task, config.checkpoint.start_from)
    parallel.broadcast(task.statistics.values())
    parallel.broadcast(task.learned.values())


def _resumed(source: Path, config: Config, parallel: Parallel, task: Task) -> str:
    return resume.describe_resumed(
        source, strategy=config.parallel.strategy, world_size=parallel.world_size, base_hash=task.base_hash
    )


def _begin(t: Training, source: Path | None) -> None:
    """Start the log and the data stream at the samples that the run has seen."""
    logger.info(
        "%s: %s learned weights of %s, %d samples in batches of %d, %s on %d rank(s)",
        *(t.task.stage, _millions(t.strategy.numel_learned), _millions(t.strategy.numel), t.settings.samples),
        *(t.settings.global_batch, t.config.parallel.strategy, t.parallel.world_size),
    )
    for key, lengthened in lengthened_intervals(t.config, t.settings.global_batch).items():
        logger.info("%s: %s is lengthened to %d samples by its least_steps", t.task.stage, key, lengthened)
    t.log.begin(t.state.samples, fresh=source is None)
    ours = source is not None and source in checkpoints(t.run.checkpoints)
    snapshots.discard_after(t.run.averages, t.state.samples if ours else 0)
    t.uploads.begin(t.state.samples if ours else 0, source if ours else None)
    if ours:
        t.state.saved_at = t.state.samples
    elif source is not None:  # The checkpoint is another run's: save a copy of it in this run's directory.
        t.state.save_due = True
        t.save()
    t.task.module.train()
    t.feed.begin(t.state.position)
    t.saver.write_seconds = t.run.status.get("save_seconds", 0.0)


def go_back(t: Training) -> None:
    """Rewind to the last good checkpoint, and skip the data seen since then. All ranks.

    Raises:
        ValueError: there is no good checkpoint, or the run has already been rewound `health.max_rewinds` times.
    """
    t.saver.wait()
    good = checkpoint.newest_on_all_ranks(t.run.checkpoints, wanted=lambda meta: meta.get("good", True))
    if good is None or t.health.rewinds >= t.config.health.max_rewinds:
        raise ValueError(hopeless_run(t.health, t.task.stage, t.settings, t.state.samples, no_checkpoint=good is None))
    later = [path for path in checkpoints(t.run.checkpoints) if path.name > good.name]
    collective.on_rank_0(lambda: checkpoint.discard(later))
    snapshots.discard_after(t.run.averages, samples_of(good))
    t.uploads.went_back(good)
    left_at = t.state.samples
    t.state.go_back(good)
    t.feed.begin(t.state.position)
    t.log.went_back(t.state.samples, t.state.position, t.health, from_=left_at, to=good.name)


def make_up_for(t: Training) -> None:
    """Do what was due when the run was stopped and was left out then. All ranks.

    So the log is that of a run that nobody stopped. The line of a held-out loss may have been written before a kill.
    """
    left_out, samples = set(t.state.left_out) if t.state.saved_at == t.state.samples else set(), t.state.samples
    if "held_out" in left_out and collective.on_rank_0(lambda: t.log.has_line("held_out", samples)):
        left_out.remove("held_out")
    with t.watchdog.allow_longer():
        if "listening" in left_out:
            t.stopping = not t.log.listen(samples)
        if "held_out" in left_out and not t.stopping:
            t.stopping = t.log.measure(samples) is None


def finish(t: Training) -> str:
    """Save a checkpoint, and export the averaged weights if all samples were seen. All ranks.

    Returns:
        "done" or "stopped".
    """
    t.tracer.close()
    with t.watchdog.allow_longer():
        if not t.parallel.any(t.stop.has_less_than(_SAVE_MARGIN * t.saver.write_seconds)):
            t.save()
        t.saver.wait()
        tried = _choose(t)
        if not t.ended or tried is None or not t.log.listen(t.state.samples):
            t.strategy.close()
            if t.parallel.main:
                saved = t.state.saved_at == t.state.samples
                t.log.stopped(t.state.samples, saved=saved, took=t.saver.write_seconds)
            t.parallel.wait()
            return "stopped"
        weights = t.state.averaged_weights()
        t.strategy.close()
        if t.parallel.main:
            _export(t, weights, tried)
        t.parallel.wait()
        return "done"


def _choose(t: Training) -> Tried | None:
    """Choose the average to export, see `choose_average`; empty if there is no choice. All ranks."""
    if not t.ended or not t.settings.ema_profiles:
        return []
    return choose_average(t.run.averages, t.state, t.log.measure)


def _export(t: Training, weights: dict[str, torch.Tensor], tried: Tried) -> None:
    """Fill a fresh Task with the averaged weights, and write the export that later stages load. On rank 0."""
    finished = fill_task(make_task(t.config, t.task.stage), weights, t.task.statistics)
    finished.reporter = t.task.reporter
    finished.finish(t.feed.from_the_beginning(whole=True), t.parallel.device)
    exported = finished.export(t.run.export)
    written = [path for path in t.run.export.rglob("*") if path.suffix in (".json", ".safetensors")]
    files = sorted(path.relative_to(t.run.export).as_posix() for path in written)
    averages = {"averages": tried, "average": chosen(tried)} if tried else {}
    t.run.write_status("done", samples=t.state.samples, of=t.settings.samples, export=exported, files=files, **averages)
    logger.info("%s: done, exported to %s", t.task.stage, t.run.export)
    t.uploads.export()


def _millions(numbers: int) -> str:
    return f"{numbers / 1e6:.2f} M"
