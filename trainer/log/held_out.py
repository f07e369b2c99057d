"""Held-out measurements during training: a few decoded clips to listen to, and the loss on more clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from trainer.inputs import Inputs
from trainer.ranks.parallel import Parallel
from trainer.ranks.strategy import Strategy
from trainer.recipes.schema import Config, TrainConfig
from trainer.stage_inputs import held_out_set
from trainer.tasks import Task

_FIRST_POSITION = 2**62  # of held-out clips: no training sample has this position, so random keys never coincide


def held_out_latents(config: Config, settings: TrainConfig, count: int) -> tuple[list[int], Tensor]:
    """Read `count` clips that are spread evenly over the held-out set.

    Returns:
        The clips' ids, and the beginnings of their x0 (B, C, T), float32.
    """
    shards = held_out_set(config)
    count = min(count, len(shards))
    ids = [round(index * (len(shards) - 1) / max(1, count - 1)) for index in range(count)]
    latents = shards.latents(ids)
    unit = math.lcm(config.latent_encoder.pooling, config.dit.patch_size)
    frames = min(settings.crop_frames, min(x0_CT.shape[1] for x0_CT in latents) // unit * unit)
    return ids, torch.stack([torch.tensor(x0_CT[:, :frames]) for x0_CT in latents]).float()


class ListeningClips:
    """A few held-out clips, always the same, that the run decodes for its log. All ranks decode all of them."""

    def __init__(self, config: Config, settings: TrainConfig, device: torch.device) -> None:
        self.ids, x0_BCT = held_out_latents(config, settings, config.log.clips)
        self.x0_BCT = x0_BCT.to(device)

    def originals(self, task: Task) -> list[tuple[str, Tensor]]:
        """Decode the clips with the AudioAE alone: the best quality that the model can reach."""
        return self._named("original", task.autoencoder.decode(self.x0_BCT))

    def decoded(self, task: Task, strategy: Strategy, between: Callable[[], None]) -> list[tuple[str, Tensor]]:
        """Decode the clips with the model; `between` is called after each step of the sampler. All ranks."""
        with strategy.together():
            audio = task.sample(self.x0_BCT, seeds=self.ids, progress=lambda done, total: between())
        return self._named("decoded", audio)

    def _named(self, kind: str, audio_BCS: Tensor) -> list[tuple[str, Tensor]]:
        """Name each clip's audio, mixed to one channel, which is what trackers play."""
        return [(f"clip_{id_}/{kind}", audio_S) for id_, audio_S in zip(self.ids, audio_BCS.mean(1), strict=True)]


class HeldOutLoss:
    """The loss on held-out clips with noise that is always the same, so that only the model changes its curve."""

    def __init__(
        self,
        config: Config,
        settings: TrainConfig,
        parallel: Parallel,
        draws: Callable[[Tensor], Mapping[str, Tensor]],
    ) -> None:
        """`draws`: the `Objective.draws` of the stage's module."""
        ids, x0_BCT = held_out_latents(config, settings, config.log.held_out)
        self.draws = draws
        self.weights = settings.loss_weights
        self.parallel, self.micro = parallel, config.parallel.micro_batch or len(ids)
        positions_B = torch.arange(len(ids)) + _FIRST_POSITION
        # All ranks must make the same number of forward passes, because each pass may gather weights. The clips are
        # padded with repeated ones, which do not count.
        padded = -(-len(ids) // parallel.world_size) * parallel.world_size
        index_B = torch.arange(padded)[parallel.rank :: parallel.world_size]
        self.counted_B = (index_B < len(ids)).double()
        self.x0_BCT, self.positions_B = x0_BCT[index_B % len(ids)], positions_B[index_B % len(ids)]

    def __call__(self, strategy: Strategy, between: Callable[[], None]) -> float:
        """Return the mean loss over all clips; `between` is called after each batch. All ranks."""
        device, losses = self.parallel.device, []
        with strategy.together():
            for batch in self._batches(device):
                losses.append(strategy.forward(batch).total(self.weights).double().cpu())
                between()
        losses_B = torch.cat(losses)
        sums = torch.stack([(losses_B * self.counted_B).sum(), self.counted_B.sum()]).to(device)
        total, count = self.parallel.sum(sums).tolist()
        return total / count

    def _batches(self, device: torch.device) -> Iterator[Inputs]:
        for x0_BCT, positions_B in zip(self.x0_BCT.split(self.micro), self.positions_B.split(self.micro), strict=True):
            yield Inputs(x0=x0_BCT, positions=positions_B).to(device, self.draws(positions_B))
