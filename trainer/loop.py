"""The one training loop. A stage is a Task; what happens in a step is here, from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from trainer.recipes.schema import Config
from trainer.schedule import is_due, learning_rate
from trainer.stop import Stop
from trainer.training import Training, finish, go_back, set_up


def train(config: Config, stage: str, *, stop: Stop | None = None, permitted: Callable[[], None] = lambda: None) -> str:
    """Train one stage to its end, from where it was left.

    Args:
        config: the whole recipe.
        stage: a trained stage.
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
    with set_up(config, stage, stop or Stop(), permitted) as training:
        while not training.ended and not training.stopping:
            step = train_step(training)
            if step is None:
                break
            if training.health.hopeless:
                with training.watchdog.patient():
                    go_back(training)
            else:
                _do_what_is_due(training, step)
        return finish(training)


class Step(NamedTuple):
    """A step that was made or skipped."""

    before: int
    """Samples seen before the step."""
    lr: float
    grad_norm: float
    """Of the whole batch, before clipping."""


def train_step(t: Training) -> Step | None:
    """One global batch: gradients of this rank's micro batches, then one step of the optimizer, unless it is skipped.

    Returns None where the step is void: a rank was asked to leave before its batch came.

    The order matters:
        1. The loss scale is set before the first forward pass, as the losses are scaled by it.
        2. The ranks' agreement begins between the last forward and backward pass, so that the backward pass hides the
           collective. Everything that ranks decide together in a step is decided by it.
        3. The saver has made its copy before the optimizer changes what is being saved.
        4. The learning rate is that of the samples seen before the step. The counters advance after the optimizer, and
           the averages and the log take in the step with the counters advanced.
    """
    state, settings = t.state, t.settings
    t.stop.step_begins(state.samples)
    t.strategy.scale = t.health.scale
    loss_sum, (t.stopping, void, save_failed) = _accumulate_gradients(t)()
    if save_failed:
        t.saver.wait()  # raises what the save failed with
    if void:
        return None

    # Take the step, if the loss and the gradient norm are sound.
    t.saver.copied()
    before, lr = state.samples, learning_rate(settings, state.samples)
    loss = loss_sum / settings.global_batch
    grad_norm = t.strategy.step(lr, lambda norm: t.health.accepts(before, loss, norm))
    t.log.step(before, t.health, t.feed, state.position)
    state.advance(settings.global_batch)
    t.ema.update(state.samples, settings.global_batch)
    t.watchdog.beat()
    return Step(before, lr, grad_norm)


def _accumulate_gradients(t: Training) -> Callable[[], tuple[float, list[bool]]]:
    """Forward and backward passes of this rank's micro batches; gradients are reduced among ranks in the last one.

    Returns:
        What waits for the ranks' agreement and gives it: the batch's loss, summed over samples; whether any rank is
        asked to leave, got no batch, or failed to save.
    """
    batch_loss = torch.zeros((), dtype=torch.float64, device=t.parallel.device)
    t.log.clock.begin()
    for part in range(t.feed.parts):
        inputs, last = t.feed.next().to(t.parallel.device), part == t.feed.parts - 1
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


def _do_what_is_due(t: Training, step: Step) -> None:
    """What comes by samples seen: a line of the log, listening samples, a checkpoint with its held-out loss."""
    config, state, before = t.config, t.state, step.before
    if is_due(before, state.samples, config.log.every) or t.ended:
        t.log.line(state.samples, lr=step.lr, grad_norm=step.grad_norm, feed=t.feed, saver=t.saver)
    if is_due(before, state.samples, config.log.samples_every) and not (t.ended or t.stopping):
        with t.watchdog.patient():
            t.stopping = not t.log.listen(state.samples)
    state.save_due = state.save_due or is_due(before, state.samples, config.checkpoint.every) or t.ended
    if state.save_due and not t.stopping and t.health.good:
        with t.watchdog.patient():
            held_out_loss = t.log.measure(state.samples)
            t.stopping = held_out_loss is None
            if held_out_loss is not None:
                t.save(held_out_loss=held_out_loss)
