"""What a run would do, before it costs anything."""

from __future__ import annotations

from collections.abc import Iterator

from launch.slurm.slurm_task import usable_ranks
from trainer.recipes.schema import Config, to_yaml
from trainer.run_directory import RunDirectory, stage_folder
from trainer.stages import STAGES


def plan(config: Config) -> Iterator[str]:
    """Lines: the resolved config, the arithmetic of batches and bits, and what each rank of each stage would hold."""
    yield from ("# resolved config", to_yaml(config), "# stages", *_stages(config), "", "# codec", *_codec(config), "")
    from launch.plan_memory import memory  # this takes seconds, and what follows some more

    yield from memory(config)
    yield from ("# run directory", *_run_directory(config), "")
    if config.cluster.kind == "slurm":
        from launch.slurm import submit

        for stage, text in submit.scripts(config):
            yield from (f"# script: {stage}", text)


def ranks_of(config: Config, stage: str) -> tuple[int, int]:
    """How many ranks a trained stage has (at least, where a cluster gives 2-8 nodes), and clips to a micro batch."""
    if config.cluster.kind == "local":
        ranks = config.parallel.processes
        return ranks, config.parallel.micro_batch or config.stage(stage).global_batch // ranks
    cluster = config.cluster.of(stage)
    return usable_ranks(config, stage, cluster.least_nodes * cluster.ranks_per_node)


def checkpoint_bytes(config: Config, stage: str) -> int:
    """What the checkpoints that are kept take, and one more that is being written; 0 where that can't be told yet."""
    from trainer.memory.outline import outline

    if config.stage(stage).samples == 0:
        return 0
    try:
        trained = sum(shape.numel() for shape in outline(config, stage).trained.values())
    except (ValueError, OSError):  # the sizes are those of weights that an earlier stage makes
        return 0
    return 16 * trained * (config.checkpoint.keep_last + config.checkpoint.keep_best + 1)


def _run_directory(config: Config) -> Iterator[str]:
    """What each stage would go on from, and the disk that its checkpoints take."""
    from trainer.checkpoints.names import checkpoints
    from trainer.formatting import size

    for stage in config.stages:
        if not STAGES[stage].trained:
            continue
        directory = RunDirectory(stage_folder(config, stage), stage)
        there = checkpoints(directory.checkpoints)
        state = "has ended" if directory.done(config) else f"goes on from {there[-1].name}" if there else "begins"
        yield f"{stage}: {state}; its checkpoints take {size(checkpoint_bytes(config, stage))}"


def _stages(config: Config) -> list[str]:
    lines = []
    for stage in config.stages:
        if not STAGES[stage].trained:
            lines.append(f"{stage}")
            continue
        settings, (ranks, micro) = config.stage(stage), ranks_of(config, stage)
        steps = -(-settings.samples // settings.global_batch)
        lines.append(
            f"{stage}: {settings.samples} samples = {steps} steps × {settings.global_batch} "
            f"({ranks} rank(s) × {micro} clips × {settings.global_batch // (ranks * micro)} accumulated), "
            f"{settings.crop_frames} frames a crop"
        )
    return lines


def _codec(config: Config) -> list[str]:
    from models.backbones.pretrained import latent_timing

    try:
        sample_rate, hop = latent_timing(config.autoencoder.kind, config.autoencoder.folder)
    except ValueError as error:
        return [f"the rates are the autoencoder's, which is not known here: {error}"]
    latent, quantizer = config.latent_encoder, config.quantizer
    samples_per_z = hop * latent.pooling
    z_rate = sample_rate / samples_per_z
    lines = [
        f"z: {latent.z_channels} × {z_rate:.3f} Hz, "
        f"{samples_per_z / latent.z_channels:.1f}× fewer numbers than the audio"
    ]
    for books in config.rates:
        bits = books * (quantizer.size.bit_length() - 1)
        lines.append(f"{books} codebooks of {quantizer.size}: {bits} bits a z, {z_rate * bits / 1000:.4f} kbps")
    return lines
