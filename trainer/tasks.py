"""What each stage optimizes. The loop is one; a stage is a Task and a row of `trainer.stages`.

A Task says which module is trained and which of its tensors are learned, gives the loss terms of each sample, listens
to itself for the log, and exports what others load.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from models.autoencoder import AudioAE
from models.backbones.pretrained import load_autoencoder, load_dit
from models.codec import SPresso
from models.decoder import Decoder
from models.diffusion import make_diffusion
from models.dit import DiT
from models.prior import Prior
from models.quantizers.quantizer import make_quantizer
from models.quantizers.residual import VECTORS_PER_CODEWORD
from models.samplers import generate
from models.sizes import CodecConfig
from models.weights import hash_state, save_weights
from trainer.data.conditions import ConditionReader
from trainer.data.stream import Batch
from trainer.data.text_embeddings import TextReader
from trainer.objectives import CodePrior, Denoiser, LatentDenoiser, Objective, Quantization, heard
from trainer.randomness import keys, uniform
from trainer.recipes.schema import Config
from trainer.run_directory import stage_folder
from trainer.stage_inputs import base_model
from trainer.stages import STAGES, stage_before

logger = logging.getLogger(__name__)

Progressed = Callable[[int, int], None] | None
_VECTORS_PER_CODEWORD = 16  # whose codes are counted, before a prior learns what they depend on


class Models(Protocol):
    """Where a Task's models come from: `LoadedModels`, or for the memory plan `trainer.memory.outline`."""

    def autoencoder(self) -> AudioAE:
        """The recipe's AudioAE."""

    def fresh_dit(self) -> Decoder:
        """A D of the recipe's sizes that has learned nothing."""

    def pretrained_dit(self) -> Decoder:
        """The D that `pretrain` or a release gives."""

    def codec(self, stage: str) -> SPresso:
        """The codec that a stage exports."""


class LoadedModels:
    """Models with their weights, from the recipe's folders and from what earlier stages exported.

    Raises:
        ValueError: (each method) a folder is missing or damaged; names it.
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
        """See `Models`; refuses a D of another formulation than the recipe's."""
        dit = load_dit(base_model(self.config))
        _require_formulation(self.config, dit)
        return dit

    def codec(self, stage: str) -> SPresso:
        """See `Models`."""
        return SPresso.from_pretrained(stage_folder(self.config, stage) / "export")


class Task(ABC):
    """One stage: its module, what of it is learned, its loss terms, its samples, its export."""

    autoencoder: AudioAE
    module: Objective
    """From `Inputs` to `Losses`. Frozen parts lie in it with requires_grad=False."""

    base_hash = ""
    """Of the frozen D that what is learned belongs to; empty where D itself is trained."""

    def __init__(self, config: Config, stage: str) -> None:
        self.config, self.stage = config, stage

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The trained parameters under their plain names."""
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}

    def conditions(self) -> list[ConditionReader]:
        """What the stream reads for D beside the latents: text, where D reads it and not all of it is dropped."""
        settings, module = self.config.stage(self.stage), self.module
        if not isinstance(module, Denoiser) or module.dit.config.text_width is None or settings.text_dropout == 1:
            return []

        def keeps(positions_B: Tensor) -> Tensor:
            return uniform(keys(self.config.seed, f"{self.stage}/text", positions_B)) >= settings.text_dropout

        return [TextReader(self.stage, module.dit.config.text_tokens, module.dit.config.text_width, keeps)]

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Tensors that are kept with the learned ones but have no gradient."""
        return {}

    def initialise(self, batches: Iterator[Batch], gather: Callable[[Tensor], Tensor], main: bool) -> None:  # noqa: B027
        """Before the first step of a fresh run. `batches` are this rank's parts; `gather` joins what ranks computed."""

    def finish(self, batches: Iterator[Batch], device: torch.device) -> None:  # noqa: B027
        """On rank 0, once the averaged weights are in place, before the export. `batches` are whole ones."""

    def to(self, device: torch.device) -> None:
        """Move all that the stage computes with, except the frozen base, which `Parallel.prepare` moves."""
        base = frozen_base(self.module)
        for module in self.modules():
            module._apply(lambda value: value if value in base else value.to(device))

    def modules(self) -> list[nn.Module]:
        """All that the stage computes with."""
        return [self.module, self.autoencoder]

    @abstractmethod
    def sample(self, x0_BCT: Tensor, seeds: list[int], progress: Progressed = None) -> Tensor:
        """Audio (B, 1, samples) that the model makes of held-out latents; `progress(done, total)` after each step."""

    @abstractmethod
    def export(self, folder: Path) -> str:
        """Write what others load; returns its hash."""

    @abstractmethod
    def read_export(self, folder: Path) -> tuple[dict[str, Tensor], str]:
        """Weights in what a stage exported, under the names that `learned` and `statistics` have; the base's hash."""


def frozen_base(module: nn.Module) -> set[Tensor]:
    """D's own weights in a stage's module where they are not trained: they may be more than a device can hold."""
    if not isinstance(module, Denoiser):
        return set()
    return {value for value in module.dit.parameters() if not value.requires_grad}


class Pretrain(Task):
    """The DiT from scratch, unconditional, for those with no pretrained one."""

    def __init__(self, config: Config, stage: str, models: Models) -> None:
        super().__init__(config, stage)
        self.autoencoder = models.autoencoder()
        self.dit = models.fresh_dit()
        self.module = Denoiser(config, stage, self.dit)

    def sample(self, x0_BCT: Tensor, seeds: list[int], progress: Progressed = None) -> Tensor:
        """Unconditional samples of the same length."""
        noise = [torch.randn(x0_BCT.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        noise_BCT = torch.stack(noise).to(x0_BCT.device)
        diffusion = make_diffusion(self.config.diffusion.name, **self.config.diffusion.options)
        sampling = self.config.sampling
        x0_BCT = generate(self.dit, diffusion, noise_BCT, {}, sampling=sampling, progress=progress)
        return self.autoencoder.decode(x0_BCT)

    def export(self, folder: Path) -> str:
        """`dit.safetensors`, its config in the header."""
        folder.mkdir(parents=True, exist_ok=True)
        state, shapes = self.dit.state_dict(), dataclasses.asdict(self.dit.config)
        formulation = {"diffusion": dataclasses.asdict(self.config.diffusion)}
        save_weights(folder / "dit.safetensors", state, shapes | formulation)
        return hash_state(shapes, state)

    def read_export(self, folder: Path) -> tuple[dict[str, Tensor], str]:
        """D's weights, of our own `pretrain` or of a release."""
        return {f"dit.{name}": value for name, value in load_dit(folder).state_dict().items()}, ""


class CodecTask(Task):
    """A stage that trains parts of an SPresso."""

    codec: SPresso

    def _codec_before(self, models: Models) -> SPresso:
        """The codec that the stage before exports."""
        before = stage_before(self.config, self.stage)
        assert before is not None, f"the stage {self.stage} builds on none"
        return models.codec(before)

    def _take(self, codec: SPresso, learned: list[nn.Module | list[nn.Parameter]]) -> None:
        self.codec, self.autoencoder, self.base_hash = codec, codec.autoencoder, codec.base_hash
        codec.requires_grad_(False)
        for part in learned:
            for parameter in part.parameters() if isinstance(part, nn.Module) else part:
                parameter.requires_grad_(True)

    def modules(self) -> list[nn.Module]:
        """All of the codec, too: it decodes for the log, also with parts that the stage's module does without."""
        return [*super().modules(), self.codec]

    @property
    def _base(self) -> Path:
        return base_model(self.config)

    def sample(self, x0_BCT: Tensor, seeds: list[int], progress: Progressed = None) -> Tensor:
        """Decoded from z, or from z_q at the highest rate once D is trained on it."""
        z_frames = x0_BCT.shape[-1] // self.codec.config.latent_encoder.pooling
        z_BZN = self.codec.x0_to_z(x0_BCT, z_frames)
        if self.codec.quantizer is not None:
            z_BZN = self.codec.quantizer.decode(self.codec.quantizer.encode(z_BZN.transpose(1, 2))).transpose(1, 2)
        noise = self.codec.noise(seeds, z_frames)
        return self.codec.z_to_audio(z_BZN, noise, sampling=self.config.sampling, progress=progress)

    def export(self, folder: Path) -> str:
        """The whole codec as it is after this stage."""
        self.codec.config.sampling = self.config.sampling
        return self.codec.save_pretrained(folder, base=self._base, card=self._card())

    def read_export(self, folder: Path) -> tuple[dict[str, Tensor], str]:
        """A codec's weights, of whatever stage."""
        codec = SPresso.from_pretrained(folder)
        return codec.state_dict(), codec.base_hash

    def _card(self) -> str:
        latent, codec = self.codec.config.latent_encoder, self.codec
        lines = [
            f"# {self.config.name}: an S-PRESSO codec, model {{model}}\n",
            f"Stage `{self.stage}`. z: {latent.z_channels} channels at {codec.z_rate:.2f} Hz "
            f"({codec.compression:.0f}× fewer numbers than the audio), AudioAE `{self.config.autoencoder.kind}`.\n",
            *(f"* {books} codebooks: {codec.kbps(books):.3f} kbps" for books in self._rates()),
            '\n    from models.codec import SPresso\n    codec = SPresso.from_pretrained("THIS FOLDER")\n',
        ]
        return "\n".join(lines)

    def _rates(self) -> list[int]:
        return self.codec.config.rates if self.codec.quantizer is not None else []


class Autoencode(CodecTask):
    """Step 1: g, f and LoRA on D together; D's own weights stay frozen."""

    def __init__(self, config: Config, stage: str, models: Models) -> None:
        super().__init__(config, stage)
        codec = fresh_codec(config, models)
        self._take(codec, [codec.g, codec.f, list(codec.adapter_parameters().values())])
        self.module = LatentDenoiser(config, stage, codec, rates=[])


class Quantize(CodecTask):
    """Step 2: the quantizer, fitted on z of the whole set; its refinement by gradient is `quantize.samples` long."""

    def __init__(self, config: Config, stage: str, models: Models) -> None:
        super().__init__(config, stage)
        codec = self._codec_before(models)
        codec.quantizer = make_quantizer(config.quantizer.description(config.latent_encoder.z_channels))
        codec.config.rates = config.rates
        self._take(codec, [codec.quantizer])
        self.module = self.quantization = Quantization(config, stage, codec)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The quantizer's mean and scale of z."""
        assert self.codec.quantizer is not None
        return {f"quantizer.{name}": value for name, value in self.codec.quantizer.named_buffers()}

    @torch.no_grad()
    def initialise(self, batches: Iterator[Batch], gather: Callable[[Tensor], Tensor], main: bool) -> None:
        """Fit the codebooks on z of random crops: every frame offset gives other vectors."""
        every = self._vectors(batches, gather, self.config.quantizer.vectors)
        if main:
            assert self.codec.quantizer is not None
            self.codec.quantizer.fit(every, seed=self.config.seed)

    @torch.no_grad()
    def finish(self, batches: Iterator[Batch], device: torch.device) -> None:
        """Give codewords that learning has left without any use another place."""
        quantizer = self.codec.quantizer
        assert quantizer is not None
        self.to(device)
        vectors = self._vectors(batches, lambda rows: rows, VECTORS_PER_CODEWORD * quantizer.size)
        if left := quantizer.revive(vectors):
            total = quantizer.books * quantizer.size
            logger.warning("%s: none of %d vectors uses %d of %d codewords", self.stage, len(vectors), left, total)
        self.to(torch.device("cpu"))

    def _vectors(self, batches: Iterator[Batch], gather: Callable[[Tensor], Tensor], count: int) -> Tensor:
        vectors: list[Tensor] = []
        while sum(map(len, vectors)) < count:
            batch = next(batches)
            x0_BCT, positions_B = batch.x0.to(self.codec.device).float(), batch.positions.to(self.codec.device)
            z_BNZ = self.codec.g(self.quantization.regained(x0_BCT, positions_B)).transpose(1, 2)
            mask_BT = None if batch.mask is None else batch.mask.to(self.codec.device)
            vectors.append(gather(z_BNZ)[gather(heard(mask_BT, z_BNZ))])
        return torch.cat(vectors)[:count]


class FitPrior(CodecTask):
    """The prior over codes that files are entropy-coded with; the codes stay as they are."""

    def __init__(self, config: Config, stage: str, models: Models) -> None:
        super().__init__(config, stage)
        codec = self._codec_before(models)
        codec.prior = Prior(books=config.quantizer.books, size=config.quantizer.size)
        self._take(codec, [codec.prior])
        self.module = CodePrior(config, stage, codec)

    @torch.no_grad()
    def initialise(self, batches: Iterator[Batch], gather: Callable[[Tensor], Tensor], main: bool) -> None:
        """Begin with how often each code occurs, at the highest rate."""
        quantizer, prior = self.codec.quantizer, self.codec.prior
        assert quantizer is not None
        assert prior is not None
        codes: list[Tensor] = []
        while sum(map(len, codes)) < min(self.config.quantizer.vectors, _VECTORS_PER_CODEWORD * quantizer.size):
            batch = next(batches)
            z_BNZ = self.codec.g(batch.x0.to(self.codec.device).float()).transpose(1, 2)
            mask_BT = None if batch.mask is None else batch.mask.to(self.codec.device)
            codes.append(gather(quantizer.encode(z_BNZ, books=self.config.rates[0]))[gather(heard(mask_BT, z_BNZ))])
        prior.fit(torch.cat(codes))


class Finetune(CodecTask):
    """Step 3: f and D's LoRA on z_q, to make good what the quantizer lost; the codes stay as they are."""

    def __init__(self, config: Config, stage: str, models: Models) -> None:
        super().__init__(config, stage)
        codec = self._codec_before(models)
        self._take(codec, [codec.f, list(codec.adapter_parameters().values())])
        self.module = LatentDenoiser(config, stage, codec, rates=config.rates)


def make_task(config: Config, stage: str, models: Models | None = None) -> Task:
    """The Task of a trained stage, which its row in `trainer.stages` names.

    Args:
        config: the whole recipe.
        stage: its name.
        models: where the Task's models come from; None: loaded with their weights.
    """
    module, _, name = STAGES[stage].task.partition(":")
    return getattr(importlib.import_module(module), name)(config, stage, models or LoadedModels(config))


def _require_formulation(config: Config, dit: Decoder) -> None:
    """D's prediction means something else in another formulation, and nothing else would tell."""
    if dit.diffusion is None:
        return
    ours = make_diffusion(config.diffusion.name, **config.diffusion.options)
    theirs = make_diffusion(dit.diffusion["name"], **dit.diffusion["options"])
    if ours != theirs:
        raise ValueError(
            f"{base_model(config)} was trained as {theirs}, and the recipe says {ours}: give the recipe diffusion.name="
            f"{dit.diffusion['name']} and diffusion.options={dit.diffusion['options']}"
        )


def fresh_codec(config: Config, models: Models) -> SPresso:
    """Step 1's start: a pretrained D with fresh LoRA, g and f."""
    dit = models.pretrained_dit()
    shapes = dataclasses.replace(config.latent_encoder, latent_channels=dit.config.channels)
    codec_config = CodecConfig(
        autoencoder=dataclasses.asdict(config.autoencoder),
        latent_encoder=shapes,
        dit=dit.config,
        diffusion=dataclasses.asdict(config.diffusion),
        lora=dataclasses.asdict(config.lora),
        window=config.stage("autoencode").crop_frames,
        sampling=config.sampling,
    )
    return SPresso(codec_config, autoencoder=models.autoencoder(), dit=dit)
