"""The training loop that all stages share. A stage is a Task; this module shows one step from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.checkpoints import snapshots
from trainer.ranks.gate import NO_STEP, Gate
from trainer.ranks.readback import Readback
from trainer.recipes.schema import Config
from trainer.schedule import bounded_intervals, is_due, learning_rate
from trainer.stop import Stop
from trainer.training import PendingStep, Training, finish, go_back, make_up_for, set_up


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
        make_up_for(training)
        while not training.ended and not training.stopping:
            step = train_step(training)
            if training.health.hopeless:
                with training.watchdog.allow_longer():
                    go_back(training)
            elif step is None:
                break
            else:
                _do_scheduled_work(training, step)
            training.tracer.step_ended(training.state.samples)
        return finish(training)


class Due(NamedTuple):
    """The scheduled work after a step."""

    line: bool
    """A line of the log."""
    listening: bool
    """Listening samples."""
    averages: bool
    """A snapshot of the averages."""
    checkpoint: bool
    """A checkpoint with its held-out loss."""


class Step(NamedTuple):
    """One training step, whether the optimizer took it or skipped it."""

    lr: float
    due: Due


def train_step(t: Training) -> Step | None:
    """Train on one global batch: accumulate gradients over this rank's micro batches, then step the optimizer.

    The host does not wait for the device to compute the step. It reads whether the step was taken while the device
    computes the next one, or at the end of this step if work is due that depends on it.

    Returns None if the step is void: a rank was asked to stop before its batch was read, or the run must be rewound.

    The order matters:
        1. The loss scale is set before the first forward pass, because the losses are multiplied by it.
        2. `Parallel.agree` starts between the last forward and backward pass, so that the backward pass hides its
           collectives. They decide everything that the ranks decide together in a step.
        3. The last step is settled before this step's gate is made, because the largest norm that the gate lets pass
           depends on the norms of all steps that were taken. By then the device has two passes to compute.
        4. The saver has finished its copy before the optimizer changes the tensors that are being saved.
        5. The learning rate depends on the samples seen before the step. The counters advance after the optimizer; the
           moving averages are updated with the advanced counter.
    """
    state, settings = t.state, t.settings
    t.stop.before_step(state.samples)
    t.strategy.scale = t.health.scale
    loss_sum, (t.stopping, void, save_failed) = _accumulate_gradients(t)()
    t.settle()
    if save_failed:
        t.saver.wait()  # raises the error of the failed save
    before, lr, loss = state.samples, learning_rate(settings, state.samples), loss_sum / settings.global_batch
    if void or t.health.hopeless:
        t.strategy.step(lr, Gate(loss, NO_STEP))  # only clears the gradients
        return None

    # Step the optimizer, unless the device finds that `Health` would reject the loss or the gradient norm.
    t.saver.wait_for_copy()
    with t.tracer.range("optimizer"):
        norm = t.strategy.step(lr, Gate(loss, t.health.largest_norm()))
    t.pending = PendingStep(before, state.position, Readback(torch.stack((loss, norm.to(loss)))))
    state.advance(settings.global_batch)
    with t.tracer.range("average"):
        t.ema.update(state.samples, settings.global_batch)
    due = _due(t, before)
    # What is due depends on whether the step was taken, and so do leaving and the loss scale of fp16.
    if any(due) or t.stopping or t.health.scaled or t.strategy.waits_for_steps:
        t.settle()
    t.log.clock.end()
    t.watchdog.beat()
    return Step(lr, due)


def _due(t: Training, before: int) -> Due:
    """Return what is due after the step that began at `before` samples."""
    now = t.state.samples
    passed = {
        key: is_due(before, now, every, least_steps=least)
        for key, (every, least) in bounded_intervals(t.config).items()
    }
    return Due(
        line=passed["log.every"] or t.ended,
        listening=passed["log.samples_every"] and not t.ended,
        averages=is_due(before, now, snapshots.interval(t.settings)) and not t.ended,
        checkpoint=passed["checkpoint.every"] or t.ended or t.state.save_due,
    )


def _accumulate_gradients(t: Training) -> Callable[[], tuple[Tensor, list[bool]]]:
    """Run the forward and backward passes of this rank's micro batches; the last pass reduces gradients among ranks.

    Returns:
        A function that waits for the ranks' agreement and returns it: the global batch's loss, summed over samples; and
        whether any rank was asked to stop, got no batch, or failed to save.
    """
    batch_loss = torch.zeros((), dtype=torch.float64, device=t.parallel.device)
    t.log.clock.begin()
    for part in range(t.feed.parts):
        with t.tracer.range("data"):
            batch, last = t.feed.next(), part == t.feed.parts - 1
            inputs = batch.to(t.parallel.device, t.task.module.draws(batch.positions))
        with t.strategy.reducing(last=last):
            with t.tracer.range("forward"):
                losses = t.strategy.forward(inputs)
                total_B = losses.total(t.settings.loss_weights)
                t.log.losses.add(losses, total_B.detach())
                batch_loss += total_B.detach().double().sum()
            if last:
                t.log.clock.computed()
                agreed = t.parallel.agree(batch_loss, t.stop(), t.feed.gave_up, t.saver.failed)
            with t.tracer.range("backward"):
                t.strategy.backward(total_B.mean() / t.feed.parts, last=last)
    return agreed


def _do_scheduled_work(t: Training, step: Step) -> None:
    """Write what is due."""
    state, due = t.state, step.due
    state.left_out = []
    if due.line:
        t.log.line(state.samples, lr=step.lr, grad_norm=t.grad_norm, feed=t.feed, saver=t.saver)
        t.tracer.look()
    if due.listening and not t.stopping:
        with t.watchdog.allow_longer():
            t.stopping = not t.log.listen(state.samples)
    if due.listening and t.stopping:
        state.left_out.append("listening")
    if due.averages:
        t.save_snapshot()
    state.save_due = due.checkpoint
    if state.save_due and not t.stopping and t.health.good:
        with t.watchdog.allow_longer():
            held_out_loss = t.log.measure(state.samples)
            t.stopping = held_out_loss is None
            if held_out_loss is not None:
                t.save(held_out_loss=held_out_loss)
    if state.save_due and t.stopping and t.health.good:
        state.left_out.append("held_out")
