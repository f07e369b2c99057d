"""What a run would do, before it costs anything."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config import TRAINED_STAGES, Config, to_yaml


def plan(config: Config) -> Iterator[str]:
    """Lines: the resolved config, the arithmetic of batches and bits, and what each rank of each stage would hold."""
    yield from ("# resolved config", to_yaml(config), "# stages", *_stages(config), "", "# codec", *_codec(config), "")
    from launch.memory import memory  # this takes seconds, and what follows some more

    yield from memory(config)


def _stages(config: Config) -> list[str]:
    ranks = config.parallel.processes
    lines = []
    for stage in config.stages:
        if stage not in TRAINED_STAGES:
            lines.append(f"{stage}")
            continue
        settings = config.stage(stage)
        micro = config.parallel.micro_batch or settings.global_batch // ranks
        steps = -(-settings.samples // settings.global_batch)
        lines.append(
            f"{stage}: {settings.samples} samples = {steps} steps × {settings.global_batch} "
            f"({ranks} rank(s) × {micro} clips × {settings.global_batch // (ranks * micro)} accumulated), "
            f"{settings.crop_frames} frames a crop"
        )
    return lines


def _codec(config: Config) -> list[str]:
    if config.autoencoder.kind != "spectral":
        return ["rates depend on the autoencoder's folder"]
    from models.autoencoder import SpectralAE

    autoencoder = SpectralAE()
    latent, quantizer = config.latent_encoder, config.quantizer
    samples_per_z = autoencoder.hop * latent.pooling
    z_rate = autoencoder.sample_rate / samples_per_z
    lines = [
        f"z: {latent.z_channels} × {z_rate:.3f} Hz, "
        f"{samples_per_z / latent.z_channels:.1f}× fewer numbers than the audio"
    ]
    for books in config.rates:
        bits = books * (quantizer.size.bit_length() - 1)
        lines.append(f"{books} codebooks of {quantizer.size}: {bits} bits a z, {z_rate * bits / 1000:.4f} kbps")
    return lines
