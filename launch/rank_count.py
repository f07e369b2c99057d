"""Chooses the number of ranks of a trained stage and its micro batch. Importing this module needs no torch."""

from __future__ import annotations

import math

from trainer.recipes.schema import Config

FEW_CLIPS = 4
"""Clips of a rank's step below which `spresso plan` speaks of a small batch: communication grows with the ranks alone,
and computing with the clips."""


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
    return usable_ranks(config, stage, _tasks(config, stage))


def batch_advice(config: Config, stage: str) -> list[str]:
    """Return a line for each way in which a stage's batch is too small for its ranks, with what to do; often none.

    On one rank no batch is too small.
    """
    settings, (ranks, micro) = config.stage(stage), ranks_of(config, stage)
    if settings.samples == 0:
        return []
    batch, tasks = settings.global_batch, _tasks(config, stage)
    key, unit = f"{stage}.global_batch", math.lcm(tasks, config.parallel.replicas)
    found = []
    if ranks < tasks:
        found.append(
            f"{tasks - ranks} of {tasks} GPUs or ranks stay idle, because {key}={batch} divides into at most {ranks}: "
            f"set {key}={-(-batch // unit) * unit}, or ask for {ranks}"
        )
    if ranks > 1 and batch < FEW_CLIPS * ranks:
        found.append(
            f"each rank has {batch // ranks} clip(s) a step, and what the ranks send does not shrink with them: set "
            f"{key}={FEW_CLIPS * ranks} or more and an lr that fits, or use at most {max(1, batch // FEW_CLIPS)} ranks"
        )
    elif ranks > 1 and micro == 1:
        found.append(
            f"{batch // ranks} clips of a rank go through one at a time: set parallel.micro_batch to a divisor of "
            f"{batch // ranks} that fits into memory"
        )
    return found


def sharding_advice(config: Config, stage: str) -> list[str]:
    """Return a line if a stage's weights are gathered across nodes at each pass and need not be; else none."""
    parallel, (ranks, _) = config.parallel, ranks_of(config, stage)
    here = config.cluster.of(stage).ranks_per_node if config.cluster.kind != "local" else ranks
    if parallel.strategy != "fsdp2" or parallel.replicas > 1 or ranks <= here or ranks % here:
        return []
    return [
        f"fsdp2 gathers weights among all {ranks} ranks at each pass, and pads those with fewer rows: "
        f"parallel.replicas={ranks // here} keeps that within each node, if a rank has the memory"
    ]


def _tasks(config: Config, stage: str) -> int:
    """Return the ranks that a stage could have: those of this machine's recipe, or those that its job asks for."""
    if config.cluster.kind == "local":
        return config.parallel.processes
    cluster = config.cluster.of(stage)
    return cluster.least_nodes * cluster.ranks_per_node
