"""The codec in use: audio ↔ z ↔ codes, all parts together, without a trainer.

`SPresso.from_pretrained(folder)` loads what a stage exports; `save_pretrained` writes it: the LoRA in PEFT's layout,
every other part as safetensors with its config in the header, and `codec.json`, which names the base model by its hash.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models import streams, windows
from models.autoencoder import AudioAE
from models.backbones.pretrained import (
    hash_state,
    load_autoencoder,
    load_dit,
    load_weights,
    outline_autoencoder,
    save_weights,
)
from models.bitstream import FramesOf, Stream
from models.codec_config import EXPORT_FORMAT, CodecConfig, Sampling, read_description
from models.decoder import Decoder
from models.diffusion import Diffusion, guided, make_diffusion
from models.latent_encoder import LatentEncoder, Upsampler
from models.prior import Coder, Prior
from models.quantizers.quantizer import Quantizer, make_quantizer
from models.samplers import sample
from models.weights import write_safetensors

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"


class SPresso(nn.Module):
    """AudioAE, g, f, D with LoRA, and, once there are any, the quantizer and the prior over its codes."""

    def __init__(
        self, config: CodecConfig, *, autoencoder: AudioAE, dit: Decoder, quantizer: Quantizer | None = None
    ) -> None:
        """Take a pretrained D, add LoRA to it and fresh g and f beside it; D itself is frozen."""
        super().__init__()
        self.config = config
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.dit = dit.requires_grad_(False)
        self.base_hash = hash_state(dataclasses.asdict(dit.config), dit.state_dict())
        from peft import inject_adapter_in_model  # here: it takes longer to import than torch, and not all need it

        inject_adapter_in_model(lora_config(config.lora, self.dit), self.dit, adapter_name=ADAPTER)
        self.g = LatentEncoder(config.latent_encoder)
        self.f = Upsampler(config.latent_encoder, dit_width=dit.config.width, dit_patch_size=dit.config.patch_size)
        self.quantizer = quantizer
        self.prior: Prior | None = None
        self.diffusion: Diffusion = make_diffusion(config.diffusion["name"], **config.diffusion["options"])
        self.model_hash = ""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.g.parameters()).device

    @property
    def z_rate(self) -> float:
        """z vectors a second of one channel."""
        return self.autoencoder.sample_rate / self._samples_per_z

    @property
    def _samples_per_z(self) -> int:
        return self.autoencoder.hop * self.config.latent_encoder.pooling

    @property
    def compression(self) -> float:
        """Numbers of audio to numbers of z, one channel each: 30, 68, 750 in the paper."""
        return self._samples_per_z / self.config.latent_encoder.z_channels

    def kbps(self, books: int) -> float:
        """Payload bit rate of one channel: z rate · M · log2 K / 1000, exactly."""
        return self.z_rate * self.fitted_quantizer().bits(books) / 1000

    def samples(self, samples: int, rate: int) -> int:
        """Samples at the AudioAE's rate for so many at another: rounded up."""
        return _samples(self.autoencoder, samples, rate)

    def z_frames(self, samples: int, rate: int | None = None) -> int:
        """z vectors that stand for so many audio samples, at the AudioAE's rate or another."""
        return _z_frames(self.autoencoder, self.config.latent_encoder.pooling, samples, rate)

    # --- audio ↔ bits ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(
        self,
        audio: Tensor,
        *,
        books: int | None = None,
        channels: str = "auto",
        origin: tuple[int, int] | None = None,
    ) -> Stream:
        """Audio → codes.

        Args:
            audio: (channels, samples) at the AudioAE's rate, of any length from 1 sample on.
            books: code with the first so many; None: all.
            channels: `auto`: stereo as mid and side, all else a channel at a time; `separate`; `mid_side`.
            origin: samples and rate of the sound before it was resampled, which the stream is to tell of.

        Raises:
            ValueError: no quantizer, books that it does not have, or channels that can't be coded so.
        """
        return streams.encode(self, audio, books=books, channels=channels, origin=origin)

    @torch.inference_mode()
    def decode(
        self,
        stream: Stream,
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Codes → audio (channels, samples) at the AudioAE's rate. One seed gives one of the sounds that the codes
        allow, always the same. Raises as `decode_blocks` does."""
        return torch.cat(list(self.decode_blocks(stream, seed=seed, sampling=sampling, progress=progress)), dim=-1)

    @torch.inference_mode()
    def decode_blocks(
        self,
        stream: Stream,
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """`decode`, a block of samples after the other: of long sounds the whole need never be held.

        Raises:
            ValueError: a stream of another model, or codes that its quantizer does not have.
        """
        yield from streams.decode_blocks(self, stream, seed=seed, sampling=sampling, progress=progress)

    def coder(self) -> Coder | None:
        """What files are entropy-coded with; None where no prior was trained."""
        return None if self.prior is None else self.prior.coder()

    def fitted_quantizer(self) -> Quantizer:
        """The quantizer; ValueError where there is none yet."""
        if self.quantizer is None:
            raise ValueError("this codec has no quantizer yet: run the stages quantize and finetune first")
        return self.quantizer

    # --- audio ↔ z ------------------------------------------------------------------------------------------------

    def audio_to_z(self, audio_B1S: Tensor) -> Tensor:
        """Levelled audio (B, 1, samples) → z (B, Z, ⌈samples / (hop · pooling)⌉)."""
        x0_BCT = self.autoencoder.encode(audio_B1S.to(self.device))
        return self.x0_to_z(x0_BCT, self.z_frames(audio_B1S.shape[-1]))

    def x0_to_z(self, x0_BCT: Tensor, z_frames: int) -> Tensor:
        """Latents of any length → z (B, Z, z_frames); long ones by windows that overlap by nearly half.

        At a window's ends g lacks what lies beyond: a quarter at each end is left to the window beside it.
        """
        pooling, window = self.config.latent_encoder.pooling, self.config.window
        margin = (window // pooling - 1) // 4 * pooling
        return windows.encode(self.g, _fit(x0_BCT, z_frames * pooling), window=window, pooling=pooling, margin=margin)

    def z_to_audio(
        self,
        z_BZN: Tensor | None,
        noise_BCT: Tensor,
        *,
        sampling: Sampling | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """z (or None: an unconditional sample) and noise → levelled audio (B, 1, T · hop)."""
        x0_BCT = self.z_to_x0(z_BZN, noise_BCT, sampling=sampling, progress=progress)
        return torch.cat(list(self.x0_to_blocks(x0_BCT)), dim=-1)

    def x0_to_blocks(self, x0_BCT: Tensor) -> Iterator[Tensor]:
        """x0 → its T · hop samples of levelled audio, a block (B, channels of the AudioAE, …) after the other."""
        # n frames, each centred on a hop boundary, span n - 1 hops: the last frame is held for the last hop
        return self.autoencoder.decode_blocks(_fit(x0_BCT, x0_BCT.shape[-1] + self.autoencoder.surplus_frames))

    def z_to_x0(
        self,
        z_BZN: Tensor | None,
        noise_BCT: Tensor,
        *,
        sampling: Sampling | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Decode with D; what is longer than one window and a half by windows jointly, see `models.windows.Joint`."""
        sampling = sampling or self.config.sampling
        window, pooling = self.config.window, self.config.latent_encoder.pooling
        if noise_BCT.shape[-1] <= 1.5 * window:
            return self._sample(z_BZN, noise_BCT, sampling, progress)
        joint = windows.Joint(self.dit, self.f, window=window, pooling=pooling)

        def stepped(done: int, total: int) -> None:
            joint.step = done
            if progress is not None:
                progress(done, total)

        return generate(joint, self.diffusion, noise_BCT, condition=z_BZN, sampling=sampling, progress=stepped)

    def _sample(self, z_BZN: Tensor | None, noise_BCT: Tensor, sampling: Sampling, progress: Any) -> Tensor:
        condition = None if z_BZN is None else self.f(z_BZN)
        return generate(self.dit, self.diffusion, noise_BCT, condition=condition, sampling=sampling, progress=progress)

    def noise(self, seeds: list[int], z_frames: int) -> Tensor:
        """Standard gaussian noise (len(seeds), C, z_frames · pooling), a row a seed, the same on every device."""
        shape = (self.autoencoder.latent_channels, z_frames * self.config.latent_encoder.pooling)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device)

    # --- weights in and out ---------------------------------------------------------------------------------------

    def parts(self) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
        """What is saved a file each: name → module and its config."""
        shapes = dataclasses.asdict(self.config.latent_encoder)
        parts: dict[str, tuple[nn.Module, dict[str, Any]]] = {
            "latent_encoder": (self.g, shapes),
            "upsampler": (self.f, shapes),
        }
        if self.quantizer is not None:
            parts["quantizer"] = (self.quantizer, self.quantizer.config())
        if self.prior is not None:
            parts["prior"] = (self.prior, self.prior.config())
        return parts

    def save_pretrained(self, folder: Path, *, base: Path, card: str) -> str:
        """Write the codec; returns the model's hash.

        Args:
            folder: is made whole or not at all; an older export there is replaced.
            base: D's pretrained weights: a file is linked or copied along, a release is named by its path, or by its
                name on the hub.
            card: text of the model card.
        """
        making = folder.with_name(folder.name + ".making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        for name, (module, config) in self.parts().items():
            save_weights(making / f"{name}.safetensors", module.state_dict(), config)
        lora_config(self.config.lora, self.dit).save_pretrained(str(making))
        write_safetensors(making / "adapter_model.safetensors", self._adapter_state(), {"format": "pt"})
        if base.is_file():
            _link_or_copy(base, making / "dit.safetensors")
        self.model_hash = self._hash()
        description = {
            "format": EXPORT_FORMAT,
            "model": self.model_hash,
            "base": {"path": _where(base), "hash": self.base_hash},
            "autoencoder_identity": self.autoencoder.identity(),
            "config": dataclasses.asdict(self.config),
        }
        (making / "codec.json").write_text(json.dumps(description, indent=2))
        (making / "README.md").write_text(card.replace("{model}", self.model_hash[:8]))
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)
        return self.model_hash

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", base: str | Path | None = None
    ) -> SPresso:
        """Load an export.

        Args:
            folder: what `save_pretrained` wrote.
            device: where to.
            base: D's pretrained weights, where they have moved since.

        Raises:
            ValueError: no export, a damaged one, or another base model than it was trained on.
        """
        folder = Path(folder)
        description = read_description(folder)
        config = CodecConfig.from_dict(description["config"])
        base_path = Path(base or description["base"]["path"] or folder / "dit.safetensors")
        codec = cls(config, autoencoder=load_autoencoder(**config.autoencoder), dit=load_dit(base_path))
        _require_same("the base model", base_path, codec.base_hash, description["base"]["hash"])
        _require_same(
            "the autoencoder", config.autoencoder, codec.autoencoder.identity(), description["autoencoder_identity"]
        )
        if (folder / "quantizer.safetensors").exists():
            codec.quantizer = make_quantizer(load_weights(folder / "quantizer.safetensors")[0])
        if (folder / "prior.safetensors").exists():
            codec.prior = Prior(**load_weights(folder / "prior.safetensors")[0])
        for name, (module, _) in codec.parts().items():
            module.load_state_dict(load_weights(folder / f"{name}.safetensors")[1])
        codec._load_adapter(load_file(str(folder / "adapter_model.safetensors")))
        codec.model_hash = description["model"]
        return codec.to(device).eval().requires_grad_(False)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The LoRA's parameters under their names in D."""
        return {name: value for name, value in self.dit.named_parameters() if f".{ADAPTER}." in name}

    def _adapter_state(self) -> dict[str, Tensor]:
        return {
            _peft_name(name): value.detach().cpu().contiguous() for name, value in self.adapter_parameters().items()
        }

    def _load_adapter(self, state: Mapping[str, Tensor]) -> None:
        own = self.adapter_parameters()
        if set(state) != {_peft_name(name) for name in own}:
            raise ValueError("adapter_model.safetensors does not fit this base model: other layers are adapted")
        for name, parameter in own.items():
            parameter.data.copy_(state[_peft_name(name)])

    def _hash(self) -> str:
        tensors = {f"adapter.{name}": value for name, value in self._adapter_state().items()}
        for part, (module, _) in self.parts().items():
            if part == "prior":  # the codes are the same with another, and what it wrote names it
                continue
            tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
        local = ("sampling", "autoencoder")  # where files lie and how they are decoded makes no other model
        identity = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in local}
        return hash_state(identity | {"base": self.base_hash, "autoencoder": self.autoencoder.identity()}, tensors)


def read_frames_of(folder: Path) -> FramesOf:
    """`z_frames` of an export, of which nothing but its description is read."""
    config = read_description(folder)["config"]
    return partial(_z_frames, outline_autoencoder(**config["autoencoder"]), config["latent_encoder"]["pooling"])


def _z_frames(autoencoder: AudioAE, pooling: int, samples: int, rate: int | None) -> int:
    return -(-_samples(autoencoder, samples, rate or autoencoder.sample_rate) // (autoencoder.hop * pooling))


def _samples(autoencoder: AudioAE, samples: int, rate: int) -> int:
    return -(-samples * autoencoder.sample_rate // rate)


def lora_config(lora: Mapping[str, Any], dit: Decoder) -> LoraConfig:
    """PEFT's own config of `rank` and `alpha`, for the layers that this D names."""
    from peft import LoraConfig

    return LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=list(dit.lora_targets))


def generate(
    dit: Callable[..., Tensor],
    diffusion: Diffusion,
    noise_BCT: Tensor,
    *,
    condition: Tensor | None,
    sampling: Sampling,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """One pass of the sampler: noise (B, C, T) → x0 (B, C, T)."""

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        return dit(x, t, condition=condition)

    def unconditional(x: Tensor, t: Tensor) -> Tensor:
        return dit(x, t)

    network = guided(conditional, unconditional, sampling.guidance if condition is not None else 1.0)
    noise_BCT = sampling.temperature * noise_BCT
    return sample(diffusion, network, noise_BCT, steps=sampling.steps, sampler=sampling.sampler, progress=progress)


def _fit(x_BCT: Tensor, frames: int) -> Tensor:
    """Cut to so many frames, or hold the last one."""
    missing = frames - x_BCT.shape[-1]
    if missing <= 0:
        return x_BCT[..., :frames]
    return torch.cat([x_BCT, x_BCT[..., -1:].expand(*x_BCT.shape[:-1], missing)], dim=-1)


def _peft_name(name: str) -> str:
    return "base_model.model." + name.replace(f".{ADAPTER}.", ".")


def _where(base: Path) -> str | None:
    """What a codec says of where its base is: nothing of a file that lies beside it; a hub's name stays one."""
    return None if base.is_file() else str(base.resolve() if base.exists() else base)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # the same bytes on the disk, yet each export is whole
    except OSError:
        shutil.copyfile(source, target)


def _require_same(what: str, where: object, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"{what} at {where} is another one than the codec was trained on ({found[:8]}, not {expected[:8]})"
        )
