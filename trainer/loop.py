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
from trainer.schedule import is_due, learning_rate
from trainer.stop import Stop
from trainer.training import PendingStep, Training, finish, go_back, set_up


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
            if training.health.hopeless:
                with training.watchdog.allow_longer():
                    go_back(training)
            elif step is None:
                break
            else:
                _do_scheduled_work(training, step)
            training.tracer.step_ended(training.state.samples)
        return finish(training)


class Step(NamedTuple):
    """One training step, whether the optimizer took it or skipped it."""

    before: int
    """Samples seen before the step."""
    lr: float


def train_step(t: Training) -> Step | None:
    """Train on one global batch: accumulate gradients over this rank's micro batches, then step the optimizer.

    The host does not wait for the device to compute the step. It reads whether the step was taken while the device
    computes the next one, or at the end of this step if work is due that depends on it.

    Returns None if the step is void: a rank was asked to stop before its batch was read, or the run must be rewound.

    The order matters:
        1. The loss scale is set before the first forward pass, because the losses are multiplied by it.
        2. `Parallel.agree` starts between the last forward and backward pass, so that the backward pass hides its
           collective. This one collective decides everything that the ranks decide together in a step.
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
    step, loss = Step(state.samples, learning_rate(settings, state.samples)), loss_sum / settings.global_batch
    if void or t.health.hopeless:
        t.strategy.step(step.lr, Gate(loss, NO_STEP))  # only clears the gradients
        return None

    # Step the optimizer, unless the device finds that `Health` would reject the loss or the gradient norm.
    t.saver.wait_for_copy()
    with t.tracer.range("optimizer"):
        norm = t.strategy.step(step.lr, Gate(loss, t.health.largest_norm()))
    t.pending = PendingStep(state.samples, state.position, Readback(torch.stack((loss, norm.to(loss)))))
    state.advance(settings.global_batch)
    with t.tracer.range("average"):
        t.ema.update(state.samples, settings.global_batch)
    if t.strategy.waits_for_steps or _depends_on(t, step):
        t.settle()
    t.log.clock.end()
    t.watchdog.beat()
    return step


def _depends_on(t: Training, step: Step) -> bool:
    """Whether what comes next depends on whether a step was taken: scheduled work, leaving, or fp16's loss scale."""
    config, now = t.config, t.state.samples
    every = (config.log.every, config.log.samples_every, config.checkpoint.every, snapshots.interval(t.settings))
    due = any(is_due(step.before, now, each) for each in every)
    return due or t.state.save_due or t.ended or t.stopping or t.health.scaled


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
    """Write what is due: a log line, listening samples, averages, or a checkpoint with its held-out loss."""
    config, state, before = t.config, t.state, step.before
    if is_due(before, state.samples, config.log.every) or t.ended:
        t.log.line(state.samples, lr=step.lr, grad_norm=t.grad_norm, feed=t.feed, saver=t.saver)
        t.tracer.look()
    if is_due(before, state.samples, config.log.samples_every) and not (t.ended or t.stopping):
        with t.watchdog.allow_longer():
            t.stopping = not t.log.listen(state.samples)
    if is_due(before, state.samples, snapshots.interval(t.settings)) and not t.ended:
        t.save_snapshot()
    state.save_due = state.save_due or is_due(before, state.samples, config.checkpoint.every) or t.ended
    if state.save_due and not t.stopping and t.health.good:
        with t.watchdog.allow_longer():
            held_out_loss = t.log.measure(state.samples)
            t.stopping = held_out_loss is None
            if held_out_loss is not None:
                t.save(held_out_loss=held_out_loss)
