"""The disk that a stage's checkpoints take."""

from __future__ import annotations

from trainer.memory.outline import outline
from trainer.recipes.schema import Config


def checkpoint_bytes(config: Config, stage: str) -> int:
    """What the checkpoints that are kept take, and one more that is being written; 0 where that can't be told yet."""
    if config.stage(stage).samples == 0:
        return 0
    try:
        trained = sum(shape.numel() for shape in outline(config, stage).trained.values())
    except (ValueError, OSError):  # the sizes are those of weights that an earlier stage makes
        return 0
    return 16 * trained * (config.checkpoint.keep_last + config.checkpoint.keep_best + 1)
