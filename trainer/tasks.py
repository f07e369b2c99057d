"""What each trained stage optimizes. All stages share one loop; a stage is a Task and a row of `trainer.stages`.

A Task holds the stage's module, says which of its parameters are trained, decodes samples for the log, and writes the
export that later stages load.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from models.autoencoder import AudioAE
from models.backbones.pretrained import load_dit
from models.block_pca import BlockMoments
from models.codec import SPresso
from models.diffusion import make_diffusion
from models.latent_encoder import start_features
from models.lora import start_factors
from models.samplers import generate
from models.sizes import Sampling
from models.weights import hash_state, save_weights
from trainer import formulation
from trainer.data.conditions import ConditionReader
from trainer.data.stream import Batch
from trainer.data.text_embeddings import TextReader
from trainer.formatting import in_markdown
from trainer.fresh_codec import fresh_codec
from trainer.objectives import Denoiser, LatentDenoiser, Objective, mask_of_z
from trainer.randomness import keys, uniform
from trainer.recipes.schema import Config
from trainer.reporter import Reporter
from trainer.run_directory import stage_folder
from trainer.stage_inputs import base_model, require_recorded
from trainer.stages import STAGES, stage_before
from trainer.task_models import LoadedModels, Models

logger = logging.getLogger(__name__)

Progressed = Callable[[int, int], None] | None
_BLOCKS_PER_FEATURE = 8


class Task(ABC):
    """One trained stage: its module, its trained parameters, its samples for the log, and its export."""

    autoencoder: AudioAE
    module: Objective
    """Maps `Inputs` to `Losses`. Its frozen parameters have requires_grad=False."""

    base_hash = ""
    """Hash of the frozen D that the trained weights belong to; empty if D itself is trained."""

    def __init__(self, config: Config, stage: str) -> None:
        self.config, self.stage = config, stage
        self.reporter = Reporter()

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their names in the module."""
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}

    def conditions(self) -> list[ConditionReader]:
        """Readers of the conditions that D needs in addition to latents: text, if D reads it and not all is dropped."""
        settings, module = self.config.stage(self.stage), self.module
        if not isinstance(module, Denoiser) or module.dit.config.text_width is None or settings.text_dropout == 1:
            return []

        def keeps(positions_B: Tensor) -> Tensor:
            return uniform(keys(self.config.seed, f"{self.stage}/text", positions_B)) >= settings.text_dropout

        return [TextReader(self.stage, module.dit.config.text_tokens, module.dit.config.text_width, keeps)]

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Tensors that checkpoints and exports store with the trained parameters, but that have no gradient."""
        return {}

    def initialise(  # noqa: B027
        self, batches: Iterator[Batch], gather: Callable[[Tensor], Tensor], whole: Iterator[Batch] | None
    ) -> None:
        """Initialise weights from data, before the first step of a fresh run. All ranks.

        Args:
            batches: this rank's parts of the first global batches.
            gather: joins the rows of all ranks, in the order of the global batch.
            whole: on rank 0, whose weights the other ranks then receive, the first global batches with all samples;
                None on the other ranks.
        """

    def finish(self, batches: Iterator[Batch], device: torch.device) -> None:  # noqa: B027
        """Complete the averaged weights before they are exported. On rank 0; `batches` are whole global batches."""

    def to(self, device: torch.device) -> None:
        """Move the stage's modules to a device, except the frozen base, which `Parallel.prepare` moves."""
        base = frozen_base(self.module)
        for module in self.modules():
            module._apply(lambda value: value if value in base else value.to(device))

    def modules(self) -> list[nn.Module]:
        """All modules that the stage uses."""
        return [self.module, self.autoencoder]

    @abstractmethod
    def sample(self, x0_BCT: Tensor, seeds: list[int], progress: Progressed = None) -> Tensor:
        """Generate audio (B, 1, samples) from held-out latents; calls `progress(done, total)` after each step."""

    @abstractmethod
    def export(self, folder: Path) -> str:
        """Write the files that later stages and users load; returns their hash."""

    @abstractmethod
    def read_export(self, folder: Path) -> tuple[dict[str, Tensor], str]:
        """Read an export's weights, by the names of `learned` and `statistics`, and the hash of its frozen base."""


def frozen_base(module: nn.Module) -> set[Tensor]:
    """Return D's frozen weights in a stage's module, which may be more than a device can hold."""
    if not isinstance(module, Denoiser):
        return set()
    return {value for value in module.dit.parameters() if not value.requires_grad}


class Pretrain(Task):
    """Trains the DiT from scratch, unconditionally, for recipes without a pretrained one."""

    def __init__(self, config: Config, stage: str, models: Models) -> None:
        super().__init__(config, stage)
        self.autoencoder = models.autoencoder()
        self.dit = models.fresh_dit()
        self.module = Denoiser(config, stage, self.dit)

    def sample(self, x0_BCT: Tensor, seeds: list[int], progress: Progressed = None) -> Tensor:
        """Generate unconditional samples of the same length as the held-out latents."""
        noise = [torch.randn(x0_BCT.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        noise_BCT = torch.stack(noise).to(x0_BCT.device)
        diffusion = make_diffusion(self.config.diffusion.name, **self.config.diffusion.options)
        sampling = self.config.sampling
        x0_BCT = generate(self.dit, diffusion, noise_BCT, {}, sampling=sampling, progress=progress)
        return self.autoencoder.decode(x0_BCT)

    def export(self, folder: Path) -> str:
        """Write `dit.safetensors`, with D's config in the header."""
        folder.mkdir(parents=True, exist_ok=True)
        state, shapes = self.dit.state_dict(), dataclasses.asdict(self.dit.config)
        formulation = {"diffusion": dataclasses.asdict(self.config.diffusion)}
        save_weights(folder / "dit.safetensors", state, shapes | formulation)
        return hash_state(shapes, state)

    def read_export(self, folder: Path) -> tuple[dict[str, Tensor], str]:
        """Read D's weights from an export of `pretrain` or from a release, trained in the recipe's formulation."""
        dit = load_dit(folder)
        formulation.require_same(self.config, {"diffusion": dit.diffusion}, folder)
        return {f"dit.{name}": value for name, value in dit.state_dict().items()}, ""


class CodecTask(Task):
    """A stage that trains parts of an SPresso codec."""

    codec: SPresso

    def _codec_before(self, models: Models) -> SPresso:
        """Load the codec that the previous stage exported."""
        before = stage_before(self.config, self.stage)
        assert before is not None, f"the stage {self.stage} builds on no other stage"
        codec = models.codec(before)
        quantizer = None if codec.quantizer is None else codec.quantizer.config()
        where = stage_folder(self.config, before) / "export"
        formulation.require_same_codec(self.config, codec.config, where, quantizer=quantizer)
        return codec

    def _take(self, codec: SPresso, learned: list[nn.Module | list[nn.Parameter]]) -> None:
        self.codec, self.autoencoder, self.base_hash = codec, codec.autoencoder, codec.base_hash
        codec.requires_grad_(False)
        for part in learned:
            for parameter in part.parameters() if isinstance(part, nn.Module) else part:
                parameter.requires_grad_(True)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The fixed factors of D's LoRA, which `pissa` has, if the stage trains D's LoRA."""
        trained = isinstance(self.module, LatentDenoiser)
        return {f"dit.{name}": value for name, value in start_factors(self.codec.dit).items()} if trained else {}

    def modules(self) -> list[nn.Module]:
        """The whole codec in addition: decoding for the log also uses parts that the stage's module lacks."""
        return [*super().modules(), self.codec]

    @property
    def _base(self) -> Path:
        return base_model(self.config)

    def sample(self, x0_BCT: Tensor, seeds: list[int], progress: Progressed = None) -> Tensor:
        """Decode the latents' z, or z_q at the highest rate if the codec has a quantizer."""
        z_frames = x0_BCT.shape[-1] // self.codec.config.latent_encoder.pooling
        z_BZN = self.codec.x0_to_z(x0_BCT, z_frames)
        if self.codec.quantizer is not None:
            z_BZN = self.codec.quantizer.decode(self.codec.quantizer.encode(z_BZN.transpose(1, 2))).transpose(1, 2)
        noise = self.codec.noise(seeds, z_frames)
        return self.codec.z_to_audio(z_BZN, noise, sampling=self.sampling, progress=progress)

    @property
    def sampling(self) -> Sampling:
        """How held-out clips are decoded for the log."""
        return self.config.sampling

    def export(self, folder: Path) -> str:
        """Write the whole codec as it is after this stage."""
        self.codec.config.sampling = self.config.sampling
        return self.codec.save_pretrained(folder, base=self._base, card=self._card())

    def read_export(self, folder: Path) -> tuple[dict[str, Tensor], str]:
        """Read the weights of a codec that any stage exported, trained in the recipe's formulation."""
        codec = SPresso.from_pretrained(folder)
        if isinstance(self.module, Denoiser):
            trained = {"diffusion": codec.config.diffusion, "lora": codec.config.lora}
            formulation.require_same(self.config, trained, f"checkpoint.start_from={folder}")
        return codec.state_dict(), codec.base_hash

    def _card(self) -> str:
        latent, codec = self.codec.config.latent_encoder, self.codec
        lines = [
            f"# {in_markdown(self.config.name)}: an S-PRESSO codec, model {{model}}\n",
            f"Stage `{self.stage}`. z: {latent.z_channels} channels at {codec.z_rate:.2f} Hz "
            f"({codec.compression:.0f}× fewer numbers than the audio), AudioAE `{self.config.autoencoder.kind}`.\n",
            *(f"* {books} codebooks: {codec.kbps(books):.3f} kbps" for books in self._rates()),
            '\n    from models.codec import SPresso\n    codec = SPresso.from_pretrained("THIS FOLDER")\n',
        ]
        return "\n".join(lines)

    def _rates(self) -> list[int]:
        return self.codec.config.rates if self.codec.quantizer is not None else []


class Autoencode(CodecTask):
    """Trains g, f and LoRA on D together (step 1 of the paper); D's own weights stay frozen."""

    def __init__(self, config: Config, stage: str, models: Models) -> None:
        super().__init__(config, stage)
        codec = fresh_codec(config, dit=models.pretrained_dit(), autoencoder=models.autoencoder())
        if codec.base_hash and (before := stage_before(config, stage)) is not None:
            require_recorded(config, before, codec.base_hash)
        self._take(codec, [codec.g, codec.f, list(codec.adapter_parameters().values())])
        self.module = LatentDenoiser(config, stage, codec, rates=[])

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What z starts from, and the fixed factors of D's LoRA."""
        start = self.codec.g.start
        of_z = {} if start is None else {f"g.start.{name}": value for name, value in start.named_buffers()}
        return of_z | super().statistics

    @torch.no_grad()
    def initialise(
        self, batches: Iterator[Batch], gather: Callable[[Tensor], Tensor], whole: Iterator[Batch] | None
    ) -> None:
        """Start z and f from the principal components of random crops. On rank 0, so that all ranks agree."""
        g, shapes = self.codec.g, self.codec.config.latent_encoder
        if g.start is None or whole is None:
            return
        moments = BlockMoments(shapes.pooling, shapes.latent_channels)
        while moments.count < _BLOCKS_PER_FEATURE * moments.size:
            batch = next(whole)
            blocks_BNTC = start_features(batch.x0.float(), shapes)
            moments.add(blocks_BNTC[mask_of_z(batch.mask, blocks_BNTC)])
        held = g.start.fit(moments, whitening=shapes.whitening)
        self.codec.f.start_from(g.start)
        logger.info(
            "%s: z starts from %d blocks of %d frames; its %d channels hold %.0f %% of what varies in them",
            *(self.stage, moments.count, shapes.pooling, shapes.z_channels, 100 * held),
        )


class Finetune(CodecTask):
    """Trains f and D's LoRA on z_q (step 3), to make up for the quantization error; the codes do not change."""

    def __init__(self, config: Config, stage: str, models: Models) -> None:
        super().__init__(config, stage)
        codec = self._codec_before(models)
        codec.config.rates = config.rates
        self._take(codec, [codec.f, list(codec.adapter_parameters().values())])
        self.module = LatentDenoiser(config, stage, codec, rates=config.rates)


def make_task(config: Config, stage: str, models: Models | None = None) -> Task:
    """Create the Task that a trained stage's row in `trainer.stages` names.

    Args:
        config: the whole recipe.
        stage: the stage's name.
        models: the source of the Task's models; None loads them with their weights.
    """
    module, _, name = STAGES[stage].task.partition(":")
    return getattr(importlib.import_module(module), name)(config, stage, models or LoadedModels(config))
