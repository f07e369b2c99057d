"""How many ranks a trained stage gets, and how its global batch is cut among them. Needs no torch."""

from __future__ import annotations

from trainer.recipes.schema import Config


def usable_ranks(config: Config, stage: str, tasks: int) -> tuple[int, int]:
    """How many of the tasks are used, and the clips to a micro batch: nothing of what is learned depends on it.

    The most ranks among which the stage's global batch divides, in groups as `parallel.replicas` asks; and micro
    batches of at most `parallel.micro_batch`.
    """
    batch, replicas = config.stage(stage).global_batch, config.parallel.replicas
    fitting = [ranks for ranks in range(1, tasks + 1) if batch % ranks == 0 and ranks % replicas == 0]
    if not fitting:
        raise ValueError(
            f"{stage}.global_batch={batch} divides among no number of ranks up to {tasks} that is a multiple of "
            f"parallel.replicas={replicas}: change one of them, or take more nodes"
        )
    ranks = fitting[-1]
    mine, most = batch // ranks, config.parallel.micro_batch or batch
    return ranks, next(micro for micro in range(min(mine, most), 0, -1) if mine % micro == 0)


def ranks_of(config: Config, stage: str) -> tuple[int, int]:
    """How many ranks a trained stage has (at least, where a cluster gives 2-8 nodes), and clips to a micro batch."""
    if config.cluster.kind == "local":
        ranks = config.parallel.processes
        return ranks, config.parallel.micro_batch or config.stage(stage).global_batch // ranks
    cluster = config.cluster.of(stage)
    return usable_ranks(config, stage, cluster.least_nodes * cluster.ranks_per_node)
