"""Where a stage's Task gets its models: from the recipe's folders and from the exports of earlier stages."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from models.autoencoder import AudioAE
from models.backbones.pretrained import load_autoencoder, load_dit
from models.codec import SPresso
from models.decoder import Decoder
from models.dit import DiT
from trainer import formulation
from trainer.recipes.schema import Config
from trainer.run_directory import stage_folder
from trainer.stage_inputs import base_model, require_recorded


class Models(Protocol):
    """The source of a Task's models: `LoadedModels`, or `trainer.memory.outline` for the memory plan."""

    def autoencoder(self) -> AudioAE:
        """The recipe's AudioAE."""

    def fresh_dit(self) -> Decoder:
        """A D of the recipe's sizes with random weights."""

    def pretrained_dit(self) -> Decoder:
        """The D that `pretrain` exported, or that a release contains."""

    def codec(self, stage: str) -> SPresso:
        """The codec that a stage exported."""


class LoadedModels:
    """Models with their weights, loaded from the recipe's folders and from the exports of earlier stages.

    Raises:
        ValueError: (each method) a folder is missing or damaged. The message names it.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def autoencoder(self) -> AudioAE:
        """See `Models`."""
        return load_autoencoder(**dataclasses.asdict(self.config.autoencoder))

    def fresh_dit(self) -> Decoder:
        """See `Models`."""
        return DiT(self.config.dit)

    def pretrained_dit(self) -> Decoder:
        """See `Models`. Raises ValueError if D was trained with another diffusion formulation than the recipe's."""
        dit = load_dit(base_model(self.config))
        formulation.require_same(self.config, {"diffusion": dit.diffusion}, base_model(self.config))
        return dit

    def codec(self, stage: str) -> SPresso:
        """See `Models`. Raises ValueError if the codec is not the one that the stage has on record."""
        folder = stage_folder(self.config, stage) / "export"
        codec = SPresso.from_pretrained(
            folder, base=self.config.pretrained.folder, autoencoder=self.config.autoencoder.folder
        )
        require_recorded(self.config, stage, codec.model_hash)
        return codec
