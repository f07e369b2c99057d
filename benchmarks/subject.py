"""The model, recipe and data that the training benchmarks share: step 1 (g, f and LoRA on a frozen D), D random."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.backbones.pretrained import load_autoencoder
from models.dit import DiT
from models.weights import save_weights
from trainer.data.shards import SetInfo, ShardWriter, scan_shard, write_index
from trainer.inputs import Inputs
from trainer.recipes.reading import load_recipe
from trainer.recipes.schema import Config
from trainer.tasks import Task, make_task

STAGE, FRAMES, CHANNELS = "autoencode", 63, 128
COMMON = (
    *("parallel.device=cpu", "parallel.threads=1", "parallel.processes=2"),
    *("dit.heads=16", "latent_encoder.heads=8", "latent_encoder.encoder_depth=2"),
    *(f"autoencode.crop_frames={FRAMES}", "autoencode.clip_norm=1.0"),
)


def recipe(folder: Path, *overrides: str) -> Config:
    """Return the tiny recipe with a larger model, on the base model and latents of a folder."""
    here = [f"pretrained.folder={folder / 'base'}", f"run_dir={folder / 'run'}", f"data.latents={folder / 'latents'}"]
    return load_recipe("tiny", [*here, *COMMON, *overrides], released=False)


def make_base(folder: Path, config: Config) -> int:
    """Write a frozen D to `folder/base` and return its number of parameters.

    Noise is added to its weights, because a fresh D outputs zeros and a trained one does not.
    """
    (folder / "base").mkdir(parents=True)
    torch.manual_seed(1)
    dit = DiT(config.dit)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    save_weights(folder / "base" / "dit.safetensors", dit.state_dict(), dataclasses.asdict(dit.config))
    return sum(parameter.numel() for parameter in dit.parameters())


def make_latents(folder: Path, config: Config, samples: int = 1024) -> None:
    """Write a training set of `samples` latents and a held-out set of 64, all noise."""
    autoencoder = load_autoencoder(**dataclasses.asdict(config.autoencoder))
    info = SetInfo(
        ae_identity=autoencoder.identity(),
        ae_options=dataclasses.asdict(config.autoencoder),
        sample_rate=autoencoder.sample_rate,
        hop=autoencoder.hop,
        latent_channels=CHANNELS,
        clip_seconds=config.data.clip_seconds,
    )
    for name, count in (("train", samples), ("test", 64)):
        with ShardWriter(folder / "latents" / name) as writer:
            for number in range(count):
                x0_CT = np.random.default_rng(number).standard_normal((CHANNELS, 100)).astype(np.float16)
                writer.write(f"{number:06d}", x0_CT, {"caption": "a sound"})
        shards = {shard: scan_shard(folder / "latents" / name / shard) for shard in writer.names}
        write_index(folder / "latents" / name, info, shards)


def task_of(config: Config) -> Task:
    """Make the task of step 1 with noise added to its learned weights.

    A fresh f outputs zeros, so g and LoRA would get no gradient in the first steps.
    """
    torch.manual_seed(0)
    task = make_task(config, STAGE)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in task.learned.values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return task


class LossOnly(nn.Module):
    """The task's module in the form that any trainer accepts: tensors go in, and a tensor of losses (b,) comes out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor:
        return self.module(Inputs(x0=x0_BCT, positions=positions_B)).total({})


def batches(global_batch: int, rank: int, world_size: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one rank's share (x0, positions) of each global batch; the world size does not change the batches."""
    while True:
        x0_BCT = torch.randn(global_batch, CHANNELS, FRAMES, generator=torch.Generator().manual_seed(start))
        positions_B = torch.arange(start, start + global_batch)
        yield x0_BCT[rank::world_size], positions_B[rank::world_size]
        start += global_batch
