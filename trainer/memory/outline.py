"""The shapes of a stage's model: of its trained and frozen parameters, and of the other models on the device.

The stage's own Task is built on the meta device, from models that have shapes and no weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.autoencoder import AudioAE
from models.backbones.pretrained import outline_autoencoder, read_dit_config
from models.codec import SPresso
from models.decoder import Decoder, make_decoder
from models.sizes import DecoderConfig
from trainer.ranks.frozen_base import convert_base
from trainer.ranks.strategy import blocks_of
from trainer.recipes.schema import Config
from trainer.stage_inputs import base_model
from trainer.stages import STAGES
from trainer.tasks import Task, make_task

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Outline:
    """The shapes of everything that a stage computes with."""

    dit: DecoderConfig
    trained: Shapes
    """Shapes of the trained parameters, by their names in the stage's module."""
    frozen: Shapes
    """Shapes of the frozen parameters in the stage's module, without weights in FP8."""
    blocks: list[set[str]]
    """The names of the parameters in each Transformer block."""
    beside: int
    """Bytes of the models outside the stage's module, in float32 on every rank: the AudioAE, and the parts of the codec
    that only decode samples for the log; and of the module's buffers, among them a base in FP8."""


def outline(config: Config, stage: str) -> Outline:
    """Return the shapes of a stage's model.

    Raises:
        ValueError: a folder of pretrained weights is missing or damaged, or holds another kind of model.
    """
    dit = dit_config(config, stage)
    task = outlined_task(config, stage, dit)
    named = dict(task.module.named_parameters())
    names = {id(value): name for name, value in named.items()}
    return Outline(
        dit,
        trained={name: value.shape for name, value in named.items() if value.requires_grad},
        frozen={name: value.shape for name, value in named.items() if not value.requires_grad},
        blocks=[{names[id(value)] for value in block.parameters()} for block in blocks_of(task.module)],
        beside=_bytes(task.modules()) - sum(value.nbytes for value in named.values()),
    )


def dit_config(config: Config, stage: str) -> DecoderConfig:
    """Return D's sizes: from the base model, or from the recipe if the stage trains D or there is no base model."""
    base = base_model(config)
    trains_dit = not STAGES[stage].builds_on
    if trains_dit or (config.pretrained.folder is None and not base.exists()):
        return config.dit
    return read_dit_config(base)


def outlined_task(config: Config, stage: str, dit: DecoderConfig) -> Task:
    """Build `make_task(config, stage)` on the meta device, with D of these sizes and without the search for codes.

    A base that the recipe wants in FP8 is in FP8.

    The search depends on values, which a meta tensor does not have. Skipping the search changes no memory, because it
    has no gradient and z_q has the shape of z.
    """
    with torch.device("meta"):
        task = make_task(config, stage, models=OutlinedModels(config, dit))
        convert_base(task.module, config.parallel, torch.device("meta"))
    task.module.searches = False
    return task


class OutlinedModels:
    """An implementation of `trainer.task_models.Models` whose models have shapes and no weights."""

    def __init__(self, config: Config, dit: DecoderConfig) -> None:
        self.config, self.dit = config, dit

    def autoencoder(self) -> AudioAE:
        """Return the recipe's AudioAE without its weights."""
        return outline_autoencoder(**dataclasses.asdict(self.config.autoencoder))

    def fresh_dit(self) -> Decoder:
        """Return D of the given sizes."""
        return make_decoder(self.dit)

    def pretrained_dit(self) -> Decoder:
        """Return D of the given sizes."""
        return make_decoder(self.dit)

    def codec(self, stage: str) -> SPresso:
        """Return the codec that the stage's own Task would export."""
        codec: SPresso = make_task(self.config, stage, models=self).codec  # type: ignore[attr-defined]
        return codec


def _bytes(modules: Iterable[nn.Module]) -> int:
    values: dict[int, Tensor] = {
        id(value): value for module in modules for value in (*module.parameters(), *module.buffers())
    }
    return sum(value.nbytes for value in values.values())
