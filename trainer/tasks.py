"""What each stage optimizes. The loop is one; a stage is a Task.

A Task says which module is trained and which of its tensors are learned, gives a loss for each sample, listens to
itself for the log, and exports what others load.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.autoencoder import AudioAE
from models.codec import CodecConfig, Sampling, SPresso, generate
from models.decoder import Decoder
from models.diffusion import make_diffusion
from models.dit import DiT
from models.pretrained import hash_state, load_autoencoder, load_dit, save_weights
from models.prior import Prior
from models.quantizer import make_quantizer
from trainer.config import Config
from trainer.data.stream import Batch
from trainer.data.text import Text, WantedText
from trainer.randomness import integers, keys, normal, uniform
from trainer.run import base_model, stage_before, stage_folder

Progressed = Callable[[int, int], None] | None
_VECTORS_PER_CODEWORD = 16  # whose codes are counted, before a prior learns what they depend on


class Losses(NamedTuple):
    """Per-sample losses (b,) and where in the noise levels' distribution each sample lay, in (0, 1), (b,)."""

    losses: Tensor
    quantiles: Tensor


class Task(ABC):
    """One stage: its module, what of it is learned, its loss, its samples, its export."""

    autoencoder: AudioAE
    module: nn.Module
    """Called as module(x0 (b, C, T), positions (b,), mask (b, T) or None, Text or None) → Losses; the mask is false
    where x0 is padded. Frozen parts lie in it with requires_grad=False."""

    base_hash = ""
    """Of the frozen D that what is learned belongs to; empty where D itself is trained."""

    def __init__(self, config: Config, stage: str) -> None:
        self.config, self.stage = config, stage

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The trained parameters under their plain names."""
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}

    @property
    def text(self) -> WantedText | None:
        """What text its D reads, if it does, and of which samples; what is dropped goes by a sample's position."""
        settings, module = self.config.stage(self.stage), self.module
        if not isinstance(module, _Denoiser) or module.dit.config.text_width is None or settings.text_dropout == 1:
            return None

        def keeps(positions_B: Tensor) -> Tensor:
            return uniform(keys(self.config.seed, f"{self.stage}/text", positions_B)) >= settings.text_dropout

        return WantedText(module.dit.config.text_tokens, module.dit.config.text_width, keeps)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Tensors that are kept with the learned ones but have no gradient."""
        return {}

    def initialise(self, batches: Iterator[Batch], gather: Callable[[Tensor], Tensor], main: bool) -> None:  # noqa: B027
        """Before the first step of a fresh run. `batches` are this rank's parts; `gather` joins what ranks computed."""

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

    def sampling(self) -> Sampling:
        """The recipe's."""
        return Sampling(**dataclasses.asdict(self.config.sampling))


def frozen_base(module: nn.Module) -> set[Tensor]:
    """D's own weights in a stage's module where they are not trained: they may be more than a device can hold."""
    if not isinstance(module, _Denoiser):
        return set()
    return {value for value in module.dit.parameters() if not value.requires_grad}


class _Denoiser(nn.Module):
    """E‖D(x0 + noise, condition) − x0‖², in the chosen formulation; what is random comes from a sample's position."""

    def __init__(self, config: Config, stage: str, dit: Decoder) -> None:
        super().__init__()
        self.dit = dit
        self.diffusion = make_diffusion(config.diffusion.name, **config.diffusion.options)
        self.purpose, self.seed = stage, config.seed
        self.condition_dropout = config.stage(stage).condition_dropout

    def forward(
        self, x0_BCT: Tensor, positions_B: Tensor, mask_BT: Tensor | None = None, text: Text | None = None
    ) -> Losses:
        u_B = uniform(self.keys("level", positions_B))
        noise_BCT = normal(self.keys("noise", positions_B), *x0_BCT.shape[1:])
        condition = self.condition(x0_BCT, positions_B)
        t_B = self.diffusion.noise_level(u_B)
        conditions = {"condition": condition}
        if text is not None:
            conditions |= {"text": text.tokens, "text_mask": text.mask}
        losses_B = self.diffusion.loss(lambda x, t: self.dit(x, t, **conditions), x0_BCT, noise_BCT, t_B, mask_BT)
        return Losses(losses_B, u_B)

    def condition(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor | None:
        """Nothing, unless a stage says otherwise."""
        return None

    def keys(self, purpose: str, positions_B: Tensor) -> Tensor:
        """Keys of one purpose, apart from the other stages' keys."""
        return keys(self.seed, f"{self.purpose}/{purpose}", positions_B)


class _LatentDenoiser(_Denoiser):
    """D on f(z), with z = g(x0), or z_q at a number of codebooks drawn for each sample."""

    def __init__(self, config: Config, stage: str, codec: SPresso, rates: list[int]) -> None:
        super().__init__(config, stage, codec.dit)
        self.g, self.f = codec.g, codec.f
        # in a tuple it is no part of this module: frozen, in float32 whatever the rest is computed in, on every rank
        self.quantizers = (codec.quantizer,)
        self.rates = rates

    def condition(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor:
        z_BZN = self.g(x0_BCT)
        if self.rates:
            z_BZN = self.quantized(z_BZN, positions_B)
        kept_B = uniform(self.keys("drop", positions_B)) >= self.condition_dropout
        return self.f(z_BZN) * kept_B[:, None, None]

    def quantized(self, z_BZN: Tensor, positions_B: Tensor) -> Tensor:
        """z_q, each sample at the rate that its key draws."""
        (quantizer,) = self.quantizers
        assert quantizer is not None
        with torch.no_grad(), torch.autocast(z_BZN.device.type, enabled=False):
            drawn_B = integers(self.keys("rate", positions_B), len(self.rates))
            z_q = torch.empty_like(z_BZN)
            for rate, books in enumerate(self.rates):
                chosen = drawn_B == rate
                codes_BNM = quantizer.encode(z_BZN[chosen].transpose(1, 2).float(), books=books)
                z_q[chosen] = quantizer.decode(codes_BNM).transpose(1, 2).to(z_q.dtype)
        return z_q


def _heard(mask_BT: Tensor | None, z_BNZ: Tensor) -> Tensor:
    """Which z are of a sample, at least in part, and not of its padding: (b, N), bool."""
    if mask_BT is None:
        return torch.ones(z_BNZ.shape[:2], dtype=torch.bool, device=z_BNZ.device)
    return mask_BT.unflatten(1, (z_BNZ.shape[1], -1)).any(2)


class _Quantization(nn.Module):
    """The quantizer's own loss on z, of clips heard at gains that their keys draw."""

    def __init__(self, config: Config, stage: str, codec: SPresso) -> None:
        super().__init__()
        self.g, self.quantizer = codec.g, codec.quantizer
        self.frozen = (codec.autoencoder,)  # in a tuple it is no part of this module
        self.gain_db, self.seed, self.purpose = config.quantizer.gain_db, config.seed, f"{stage}/gain"

    def forward(
        self, x0_BCT: Tensor, positions_B: Tensor, mask_BT: Tensor | None = None, text: Text | None = None
    ) -> Losses:
        assert self.quantizer is not None
        with torch.no_grad():
            z_BNZ = self.g(self.regained(x0_BCT, positions_B)).transpose(1, 2)
        losses_BN = self.quantizer(z_BNZ.flatten(0, 1)).unflatten(0, z_BNZ.shape[:2])
        heard_BN = _heard(mask_BT, z_BNZ).to(losses_BN.dtype)
        losses_B = (losses_BN * heard_BN).sum(1) / heard_BN.sum(1).clamp_min(1)
        return Losses(losses_B, torch.full_like(losses_B, 0.5))

    def regained(self, x0_BCT: Tensor, positions_B: Tensor) -> Tensor:
        """x0 as it would be at another gain, the sample's own."""
        if self.gain_db == 0:
            return x0_BCT
        (autoencoder,) = self.frozen
        gain_db_B = self.gain_db * (2 * uniform(keys(self.seed, self.purpose, positions_B)) - 1)
        with torch.autocast(x0_BCT.device.type, enabled=False):
            held_BCT = torch.cat([x0_BCT, x0_BCT[..., -1:]], dim=-1).float()  # its last frame has a whole hop, too
            audio_B1S = autoencoder.decode(held_BCT) * 10 ** (gain_db_B.float() / 20)[:, None, None]
            return autoencoder.encode(audio_B1S)[..., : x0_BCT.shape[-1]].to(x0_BCT.dtype)


class _CodePrior(nn.Module):
    """Bits a code, of z's codes at a number of codebooks drawn for each sample."""

    def __init__(self, config: Config, stage: str, codec: SPresso) -> None:
        super().__init__()
        self.g, self.prior = codec.g, codec.prior
        self.quantizers = (codec.quantizer,)  # in a tuple for the reasons that _LatentDenoiser has
        self.seed, self.purpose, self.rates = config.seed, stage, config.rates

    def forward(
        self, x0_BCT: Tensor, positions_B: Tensor, mask_BT: Tensor | None = None, text: Text | None = None
    ) -> Losses:
        (quantizer,), prior = self.quantizers, self.prior
        assert quantizer is not None
        assert prior is not None
        with torch.no_grad():
            z_BNZ = self.g(x0_BCT).transpose(1, 2).float()
        heard_BN = _heard(mask_BT, z_BNZ).float()
        drawn_B = integers(keys(self.seed, f"{self.purpose}/rate", positions_B), len(self.rates))
        losses_B = z_BNZ.new_zeros(len(z_BNZ))
        for rate, books in enumerate(self.rates):
            chosen_B = drawn_B == rate
            if chosen_B.any():
                bits_BN = prior(quantizer.encode(z_BNZ[chosen_B], books=books)).mean(dim=2) * heard_BN[chosen_B]
                losses_B[chosen_B] = bits_BN.sum(1) / heard_BN[chosen_B].sum(1).clamp_min(1)
        return Losses(losses_B, torch.full_like(losses_B, 0.5))


class Pretrain(Task):
    """The DiT from scratch, unconditional, for those with no pretrained one."""

    def __init__(self, config: Config, stage: str) -> None:
        super().__init__(config, stage)
        self.autoencoder = load_autoencoder(**dataclasses.asdict(config.autoencoder))
        self.dit = DiT(config.dit)
        self.module = _Denoiser(config, stage, self.dit)

    def sample(self, x0_BCT: Tensor, seeds: list[int], progress: Progressed = None) -> Tensor:
        """Unconditional samples of the same length."""
        noise = [torch.randn(x0_BCT.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        noise_BCT = torch.stack(noise).to(x0_BCT.device)
        diffusion = make_diffusion(self.config.diffusion.name, **self.config.diffusion.options)
        x0_BCT = generate(self.dit, diffusion, noise_BCT, condition=None, sampling=self.sampling(), progress=progress)
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


class _CodecTask(Task):
    """A stage that trains parts of an SPresso."""

    codec: SPresso

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
        return self.codec.z_to_audio(z_BZN, noise, sampling=self.sampling(), progress=progress)

    def export(self, folder: Path) -> str:
        """The whole codec as it is after this stage."""
        self.codec.config.sampling = self.sampling()
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


class Autoencode(_CodecTask):
    """Step 1: g, f and LoRA on D together; D's own weights stay frozen."""

    def __init__(self, config: Config, stage: str) -> None:
        super().__init__(config, stage)
        codec = fresh_codec(config)
        self._take(codec, [codec.g, codec.f, list(codec.adapter_parameters().values())])
        self.module = _LatentDenoiser(config, stage, codec, rates=[])


class Quantize(_CodecTask):
    """Step 2: the quantizer, fitted on z of the whole set; its refinement by gradient is `quantize.samples` long."""

    def __init__(self, config: Config, stage: str) -> None:
        super().__init__(config, stage)
        codec = SPresso.from_pretrained(stage_folder(config, "autoencode") / "export")
        codec.quantizer = make_quantizer(config.quantizer.description(config.latent_encoder.z_channels))
        codec.config.rates = config.rates
        self._take(codec, [codec.quantizer])
        self.module = self.quantization = _Quantization(config, stage, codec)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The quantizer's mean and scale of z."""
        assert self.codec.quantizer is not None
        return {f"quantizer.{name}": value for name, value in self.codec.quantizer.named_buffers()}

    @torch.no_grad()
    def initialise(self, batches: Iterator[Batch], gather: Callable[[Tensor], Tensor], main: bool) -> None:
        """Fit the codebooks on z of random crops: every frame offset gives other vectors."""
        vectors: list[Tensor] = []
        while sum(map(len, vectors)) < self.config.quantizer.vectors:
            batch = next(batches)
            x0_BCT, positions_B = batch.x0.to(self.codec.device).float(), batch.positions.to(self.codec.device)
            z_BNZ = self.codec.g(self.quantization.regained(x0_BCT, positions_B)).transpose(1, 2)
            mask_BT = None if batch.mask is None else batch.mask.to(self.codec.device)
            vectors.append(gather(z_BNZ)[gather(_heard(mask_BT, z_BNZ))])
        if main:
            assert self.codec.quantizer is not None
            every = torch.cat(vectors)[: self.config.quantizer.vectors]
            self.codec.quantizer.fit(every, seed=self.config.seed)


class FitPrior(_CodecTask):
    """The prior over codes that files are entropy-coded with; the codes stay as they are."""

    def __init__(self, config: Config, stage: str) -> None:
        super().__init__(config, stage)
        codec = SPresso.from_pretrained(stage_folder(config, "quantize") / "export")
        codec.prior = Prior(books=config.quantizer.books, size=config.quantizer.size)
        self._take(codec, [codec.prior])
        self.module = _CodePrior(config, stage, codec)

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
            codes.append(gather(quantizer.encode(z_BNZ, books=self.config.rates[0]))[gather(_heard(mask_BT, z_BNZ))])
        prior.fit(torch.cat(codes))


class Finetune(_CodecTask):
    """Step 3: f and D's LoRA on z_q, to make good what the quantizer lost; the codes stay as they are."""

    def __init__(self, config: Config, stage: str) -> None:
        super().__init__(config, stage)
        before = stage_before(config, stage)
        assert before is not None
        codec = SPresso.from_pretrained(stage_folder(config, before) / "export")
        self._take(codec, [codec.f, list(codec.adapter_parameters().values())])
        self.module = _LatentDenoiser(config, stage, codec, rates=config.rates)


TASKS: dict[str, type[Task]] = {
    "pretrain": Pretrain,
    "autoencode": Autoencode,
    "quantize": Quantize,
    "prior": FitPrior,
    "finetune": Finetune,
}


def make_task(config: Config, stage: str) -> Task:
    """The Task of a trained stage."""
    return TASKS[stage](config, stage)


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


def fresh_codec(config: Config) -> SPresso:
    """Step 1's start: a pretrained D with fresh LoRA, g and f."""
    dit = load_dit(base_model(config))
    _require_formulation(config, dit)
    shapes = dataclasses.replace(config.latent_encoder, latent_channels=dit.config.channels)
    codec_config = CodecConfig(
        autoencoder=dataclasses.asdict(config.autoencoder),
        latent_encoder=shapes,
        dit=dit.config,
        diffusion=dataclasses.asdict(config.diffusion),
        lora=dataclasses.asdict(config.lora),
        window=config.autoencode.crop_frames,
        sampling=Sampling(**dataclasses.asdict(config.sampling)),
    )
    return SPresso(codec_config, autoencoder=load_autoencoder(**codec_config.autoencoder), dit=dit)
