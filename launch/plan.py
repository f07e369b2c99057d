"""`spresso plan`: what a run would do, shown before anything is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from launch.pipeline import asked_sounds
from launch.plan_memory import memory
from launch.rank_count import batch_advice, ranks_of, sharding_advice
from launch.slurm import submit
from models.backbones.pretrained import latent_timing
from trainer.checkpoints.disk_space import checkpoint_bytes
from trainer.checkpoints.names import checkpoints
from trainer.data.mixed_sources import describe
from trainer.formatting import size
from trainer.recipes.ranges import with_ranges
from trainer.recipes.schema import Config
from trainer.recipes.values import to_yaml
from trainer.run_directory import RunDirectory, stage_folder
from trainer.stages import STAGES
from trainer.stores.store import trouble

_PATIENCE = 20.0  # seconds for the server of the sounds to answer


def plan(config: Config) -> Iterator[str]:
    """Yield lines: the resolved config, batch sizes, bit rates, memory per rank, the run directory, job scripts."""
    yield from ("# resolved config, and the range of each number", with_ranges(to_yaml(config)))
    yield from ("# stages", *_stages(config), "", "# codec", *_codec(config), "")
    yield from memory(config)
    yield from ("# run directory", *_run_directory(config), "")
    if config.cluster.kind == "slurm":
        for stage, text in submit.scripts(config):
            yield from (f"# script: {stage}", text)


def _run_directory(config: Config) -> Iterator[str]:
    """Yield what each trained stage would resume from, and the disk space of its checkpoints."""
    for stage in config.stages:
        if not STAGES[stage].trained:
            continue
        directory = RunDirectory(stage_folder(config, stage), stage)
        there = checkpoints(directory.checkpoints)
        state = "is done" if directory.done(config) else f"resumes from {there[-1].name}" if there else "starts anew"
        yield f"{stage}: {state}; its checkpoints take {size(checkpoint_bytes(config, stage))}"
    if config.checkpoint.upload is not None:
        yield (
            f"  ! {problem}"
            if (problem := trouble(config.checkpoint.upload))
            else (f"{config.checkpoint.upload} takes uploads")
        )


def _stages(config: Config) -> list[str]:
    lines = []
    for stage in config.stages:
        if not STAGES[stage].trained:
            lines.append(f"{stage}: {_sounds(config)}" if stage == "prepare" and config.data.audio else f"{stage}")
            continue
        settings, (ranks, micro) = config.stage(stage), ranks_of(config, stage)
        steps = -(-settings.samples // settings.global_batch)
        lines.append(
            f"{stage}: {settings.samples} samples = {steps} steps × {settings.global_batch} "
            f"({ranks} rank(s) × {micro} clips × {settings.global_batch // (ranks * micro)} accumulated), "
            f"{settings.crop_frames} frames per crop"
        )
        advice = batch_advice(config, stage) + sharding_advice(config, stage)
        lines += [f"  ! {line}" for line in advice]
    return lines


def _sounds(config: Config) -> str:
    """Return what holds the sounds, or why it can't be told."""
    try:
        return describe(replace(asked_sounds(config), patience=_PATIENCE))
    except (ValueError, OSError) as error:
        return f"! {error}"


def _codec(config: Config) -> list[str]:
    try:
        sample_rate, hop = latent_timing(config.autoencoder.kind, config.autoencoder.folder)
    except ValueError as error:
        return [f"bit rates are unknown without the autoencoder: {error}"]
    latent, quantizer = config.latent_encoder, config.quantizer
    samples_per_z = hop * latent.pooling
    z_rate = sample_rate / samples_per_z
    lines = [
        f"z: {latent.z_channels} × {z_rate:.3f} Hz, "
        f"{samples_per_z / latent.z_channels:.1f}× fewer numbers than the audio"
    ]
    for books in config.rates:
        bits = books * (quantizer.size.bit_length() - 1)
        lines.append(f"{books} codebook(s) of {quantizer.size}: {bits} bits per z, {z_rate * bits / 1000:.4f} kbps")
    return lines
