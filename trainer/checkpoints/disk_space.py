"""The disk space that a stage's checkpoints take."""

from __future__ import annotations

from trainer.checkpoints import snapshots
from trainer.memory.outline import outline
from trainer.recipes.schema import Config


def checkpoint_bytes(config: Config, stage: str) -> int:
    """Return the bytes of all checkpoints that are kept and of the one being written; 0 if they are not known yet.

    Snapshots of the averages are counted too.
    """
    if config.stage(stage).samples == 0:
        return 0
    try:
        trained = sum(shape.numel() for shape in outline(config, stage).trained.values())
    except (ValueError, OSError):  # The sizes depend on weights that an earlier stage has not exported yet.
        return 0
    whole = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    whole += config.checkpoint.upload is not None  # the one that is being uploaded stays
    if not config.stage(stage).ema_profiles:
        return 16 * trained * whole
    return trained * (20 * whole + 8 * snapshots.COUNT)
