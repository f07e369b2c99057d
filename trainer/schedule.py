"""Schedules as functions of the samples seen: the learning rate, and whether an interval has passed."""

from __future__ import annotations

from trainer.recipes.schema import Config, TrainConfig


def learning_rate(settings: TrainConfig, samples: int) -> float:
    """Return the learning rate of the step after `samples` samples: linear warm-up, constant, linear decay to zero."""
    rising = min(1.0, (samples + settings.global_batch) / settings.warmup) if settings.warmup else 1.0
    falling = settings.decay * settings.samples
    left = settings.samples - samples
    return settings.lr * rising * (min(1.0, left / falling) if falling else 1.0)


def is_due(before: int, now: int, every: int, *, least_steps: int = 1) -> bool:
    """Whether the samples seen passed a multiple of the interval in the step from `before` to `now` samples.

    The interval is `every` samples, or `least_steps` steps if that is more; if `every` is 0, it never passes.
    """
    interval = max(every, least_steps * (now - before))
    return every > 0 and now // interval > before // interval


def bounded_intervals(config: Config) -> dict[str, tuple[int, int]]:
    """Return the intervals that are bounded in steps: the recipe's key → (samples, least steps)."""
    log, checkpoint = config.log, config.checkpoint
    return {
        "log.every": (log.every, log.least_steps),
        "log.samples_every": (log.samples_every, checkpoint.least_steps),
        "checkpoint.every": (checkpoint.every, checkpoint.least_steps),
    }


def lengthened_intervals(config: Config, batch: int) -> dict[str, int]:
    """Return the samples of each interval that its least steps make longer than the recipe says, by its key."""
    intervals = bounded_intervals(config)
    return {key: least * batch for key, (every, least) in intervals.items() if 0 < every < least * batch}
