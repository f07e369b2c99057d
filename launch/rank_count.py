"""Chooses the number of ranks of a trained stage and its micro batch. Importing this module needs no torch."""

from __future__ import annotations

from trainer.recipes.schema import Config


def usable_ranks(config: Config, stage: str, tasks: int) -> tuple[int, int]:
    """Return how many of the tasks serve as ranks, and the clips per micro batch. Neither changes what is learned.

    The number of ranks is the largest that divides the stage's global batch and is a multiple of `parallel.replicas`.
    The micro batch is the largest divisor of a rank's share that is at most `parallel.micro_batch`.

    Raises:
        ValueError: no number of ranks up to `tasks` fits.
    """
    batch, replicas = config.stage(stage).global_batch, config.parallel.replicas
    fitting = [ranks for ranks in range(1, min(tasks, batch) + 1) if batch % ranks == 0 and ranks % replicas == 0]
    if not fitting:
        raise ValueError(
            f"no number of ranks up to {tasks} divides {stage}.global_batch={batch} and is a multiple of "
            f"parallel.replicas={replicas}: change one of the two, or use more nodes"
        )
    ranks = fitting[-1]
    share, most = batch // ranks, config.parallel.micro_batch or batch
    return ranks, next(micro for micro in range(min(share, most), 0, -1) if share % micro == 0)


def ranks_of(config: Config, stage: str) -> tuple[int, int]:
    """Return a trained stage's number of ranks (the smallest, for a range of nodes) and its clips per micro batch."""
    if config.cluster.kind == "local":
        ranks = config.parallel.processes
        return ranks, config.parallel.micro_batch or config.stage(stage).global_batch // ranks
    cluster = config.cluster.of(stage)
    return usable_ranks(config, stage, cluster.least_nodes * cluster.ranks_per_node)
