"""The training loop that all stages share. A stage is a Task; this module shows one step from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from trainer.checkpoints import snapshots
from trainer.recipes.schema import Config
from trainer.schedule import is_due, learning_rate
from trainer.stop import Stop
from trainer.training import Training, finish, go_back, set_up


def train(
    config: Config, stage: str, *, stop: Stop | None = None, require_ownership: Callable[[], None] = lambda: None
) -> str:
    """Train one stage until all its samples are seen, or until it is asked to stop. Resumes from a checkpoint if any.

    Args:
        config: the whole recipe.
        stage: the name of a trained stage.
        stop: polled at each step, and during work that takes longer than a step. When it returns True on any rank, all
            ranks save a checkpoint together and exit.
        require_ownership: called on rank 0 before each write; raises if a later start of this run has taken over.

    Returns:
        "done" or "stopped".

    Raises:
        ValueError: the run directory holds another run, an input of the stage is missing, the training diverges, or the
            device has too little memory. The message says how to fix it.
        OSError: a checkpoint could not be written. Older checkpoints are untouched.
    """
    with set_up(config, stage, stop or Stop(), require_ownership) as training:
        while not training.ended and not training.stopping:
            step = train_step(training)
            if step is None:
                break
            if training.health.hopeless:
                with training.watchdog.allow_longer():
                    go_back(training)
            else:
                _do_scheduled_work(training, step)
        return finish(training)


class Step(NamedTuple):
    """One training step, whether the optimizer took it or `Health` skipped it."""

    before: int
    """Samples seen before the step."""
    lr: float
    grad_norm: float
    """Gradient norm of the whole global batch, before clipping."""


def train_step(t: Training) -> Step | None:
    """Train on one global batch: accumulate gradients over this rank's micro batches, then step the optimizer.

    Returns None if the step is void: a rank was asked to stop before its batch was read.

    The order matters:
        1. The loss scale is set before the first forward pass, because the losses are multiplied by it.
        2. `Parallel.agree` starts between the last forward and backward pass, so that the backward pass hides its
           collective. This one collective decides everything that the ranks decide together in a step.
        3. The saver has finished its copy before the optimizer changes the tensors that are being saved.
        4. The learning rate depends on the samples seen before the step. The counters advance after the optimizer; the
           moving averages are updated with the advanced counter.
    """
    state, settings = t.state, t.settings
    t.stop.before_step(state.samples)
    t.strategy.scale = t.health.scale
    loss_sum, (t.stopping, void, save_failed) = _accumulate_gradients(t)()
    if save_failed:
        t.saver.wait()  # raises the error of the failed save
    if void:
        return None

    # Step the optimizer, unless `Health` rejects the loss or the gradient norm.
    t.saver.wait_for_copy()
    before, lr = state.samples, learning_rate(settings, state.samples)
    loss = loss_sum / settings.global_batch
    grad_norm = t.strategy.step(lr, lambda norm: t.health.accepts(before, loss, norm))
    t.log.step(before, t.health, t.feed, state.position)
    state.advance(settings.global_batch)
    t.ema.update(state.samples, settings.global_batch)
    t.watchdog.beat()
    return Step(before, lr, grad_norm)


def _accumulate_gradients(t: Training) -> Callable[[], tuple[float, list[bool]]]:
    """Run the forward and backward passes of this rank's micro batches; the last pass reduces gradients among ranks.

    Returns:
        A function that waits for the ranks' agreement and returns it: the global batch's loss, summed over samples; and
        whether any rank was asked to stop, got no batch, or failed to save.
    """
    batch_loss = torch.zeros((), dtype=torch.float64, device=t.parallel.device)
    t.log.clock.begin()
    for part in range(t.feed.parts):
        batch, last = t.feed.next(), part == t.feed.parts - 1
        inputs = batch.to(t.parallel.device, t.task.module.draws(batch.positions))
        with t.strategy.reducing(last=last):
            losses = t.strategy.forward(inputs)
            total_B = losses.total(t.settings.loss_weights)
            t.log.losses.add(losses, total_B.detach())
            batch_loss += total_B.detach().double().sum()
            if last:
                t.log.clock.computed()
                agreed = t.parallel.agree(batch_loss, t.stop(), t.feed.gave_up, t.saver.failed)
            t.strategy.backward(total_B.mean() / t.feed.parts, last=last)
    return agreed


def _do_scheduled_work(t: Training, step: Step) -> None:
    """Write what is due: a log line, listening samples, averages, or a checkpoint with its held-out loss."""
    config, state, before = t.config, t.state, step.before
    if is_due(before, state.samples, config.log.every, least_steps=config.log.least_steps) or t.ended:
        t.log.line(state.samples, lr=step.lr, grad_norm=step.grad_norm, feed=t.feed, saver=t.saver)
    seldom = config.checkpoint.least_steps
    if is_due(before, state.samples, config.log.samples_every, least_steps=seldom) and not (t.ended or t.stopping):
        with t.watchdog.allow_longer():
            t.stopping = not t.log.listen(state.samples)
    if is_due(before, state.samples, snapshots.interval(t.settings)) and not t.ended:
        t.save_snapshot()
    due = is_due(before, state.samples, config.checkpoint.every, least_steps=seldom)
    state.save_due = state.save_due or due or t.ended
    if state.save_due and not t.stopping and t.health.good:
        with t.watchdog.allow_longer():
            held_out_loss = t.log.measure(state.samples)
            t.stopping = held_out_loss is None
            if held_out_loss is not None:
                t.save(held_out_loss=held_out_loss)
