"""The codec as a user runs it, without a trainer: audio ↔ z ↔ codes.

`SPresso.from_pretrained(folder)` loads the export of a training stage, and `save_pretrained` writes one. An export
holds the LoRA in PEFT's layout, every other part as safetensors with its config in the header, and `codec.json`, which
names the base model by its hash.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import export, identity, windows
from models.autoencoder import AudioAE
from models.backbones.pretrained import load_autoencoder, load_dit
from models.bitstream import RATE_RANGE, Header, Stream
from models.channels import channels_of
from models.decoder import Decoder
from models.diffusion import Diffusion, make_diffusion
from models.distilled import Distilled, steps_of
from models.encoding import check_audio, encode_sound, resize
from models.frame_counts import count_z_frames
from models.latent_encoder import LatentEncoder, Upsampler
from models.live_decoder import LiveDecoder
from models.lora import (
    ADAPTER,
    DISTILLED,
    adapter_parameters,
    add_distilled,
    file_config,
    file_tensors,
    inject_lora,
    load_file_tensors,
)
from models.prior import Coder, Prior
from models.quantizers.quantizer import Quantizer, make_quantizer
from models.resampling import resampled_samples
from models.samplers import decode_steps
from models.sizes import CodecConfig, Sampling
from models.weights import hash_state

_SIDE_SEED_OFFSET = 2**31
"""Added to the seed of the side row. If mid and side started from the same noise, everything that D invents would be
panned to one channel."""


class SPresso(nn.Module):
    """The AudioAE, g, f and D with its LoRA; once they are trained, also the quantizer and the prior over its codes."""

    def __init__(
        self, config: CodecConfig, *, autoencoder: AudioAE, dit: Decoder, quantizer: Quantizer | None = None
    ) -> None:
        """Build a codec around a pretrained D: freeze D, inject a LoRA into it, and initialise g and f at random."""
        super().__init__()
        self.config = config
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.dit = dit.requires_grad_(False)
        # a model on the meta device, such as the memory plan's, has no weights to hash
        outlined = next(dit.parameters()).is_meta
        self.base_hash = "" if outlined else hash_state(dataclasses.asdict(dit.config), dit.state_dict())
        inject_lora(self.dit, config.lora)
        self.g = LatentEncoder(config.latent_encoder)
        self.f = Upsampler(config.latent_encoder, dit_width=dit.config.width, dit_patch_size=dit.config.patch_size)
        self.quantizer = quantizer
        self.prior: Prior | None = None
        self.distilled: Distilled | None = None
        self.diffusion: Diffusion = make_diffusion(config.diffusion["name"], **config.diffusion["options"])
        self.model_hash = ""

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.g.parameters()).device

    @property
    def z_rate(self) -> float:
        """Vectors z per second of one channel."""
        return self.autoencoder.sample_rate / self._samples_per_z

    @property
    def _samples_per_z(self) -> int:
        return self.autoencoder.hop * self.config.latent_encoder.pooling

    @property
    def compression(self) -> float:
        """Samples of audio per number of z, in one channel: 30, 68 and 750 in the paper."""
        return self._samples_per_z / self.config.latent_encoder.z_channels

    def kbps(self, books: int) -> float:
        """Return the exact payload bit rate of one channel in kbit/s: z rate · M · log2 K / 1000 with M = `books`."""
        return self.z_rate * self.fitted_quantizer().bits(books) / 1000

    def samples(self, samples: int, rate: int) -> int:
        """Convert a number of samples at `rate` to the AudioAE's sample rate, rounded up."""
        return resampled_samples(samples, rate, self.autoencoder.sample_rate)

    def z_frames(self, samples: int, rate: int | None = None) -> int:
        """Return how many vectors z encode `samples` samples at `rate` (None: the AudioAE's sample rate)."""
        return count_z_frames(self.autoencoder, self.config.latent_encoder.pooling, samples, rate)

    # --- audio ↔ bits ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(
        self,
        audio: Tensor,
        *,
        sample_rate: int | None = None,
        books: int | None = None,
        channels: str = "auto",
        error_per_bit: float = 0.0,
    ) -> Stream:
        """Encode audio to codes; for sound that does not fit into memory, see `models.encoding.encode_sound`.

        Args:
            audio: floats with full scale 1, (channels, samples), at least 1 sample.
            sample_rate: of the audio in Hz, which is resampled if needed; None: the AudioAE's.
            books: number of codebooks to use, counted from the first; None uses all of them.
            channels: `separate` codes each channel by itself and `mid_side` codes (L + R) / 2 and (L - R) / 2. `auto`
                codes stereo in one row if the AudioAE is stereo; otherwise it takes `mid_side` for stereo, unless one
                channel is far quieter than the side. Other numbers of channels are coded by `separate`.
            error_per_bit: error that z may add for each bit saved, see `models.encoding.encode_sound`.

        Raises:
            ValueError: the audio is not like this, or the codec or these channels can't do what is asked.
        """
        check_audio(audio)
        rate = self.autoencoder.sample_rate if sample_rate is None else sample_rate
        low, high = RATE_RANGE
        if not (isinstance(rate, int) and low <= rate <= high):
            raise ValueError(f"sample_rate={rate!r} must be a whole number of Hz from {low} to {high}")
        sound = audio.detach().float().cpu().numpy()
        return encode_sound(
            self, lambda: [sound], sample_rate=rate, books=books, channels=channels, error_per_bit=error_per_bit
        )

    @torch.inference_mode()
    def decode(
        self,
        stream: Stream,
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Decode codes to audio (channels, samples) at the AudioAE's sample rate.

        The codes allow many sounds; a seed always picks the same one. Raises the same errors as `decode_blocks`.
        """
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
        """Yield the audio that `decode` returns in consecutive blocks (channels, …), to save memory for long sounds.

        Raises:
            ValueError: another model wrote the stream, or its codes do not fit this codec's quantizer.
        """
        header = stream.header
        self.require_own(header)
        z_RZN = self.fitted_quantizer().decode(torch.from_numpy(stream.codes).to(self.device)).transpose(1, 2)
        noise_RCT = self.noise(self.row_seeds(header, seed), z_RZN.shape[-1])
        x0_RCT = self.z_to_x0(z_RZN, noise_RCT, sampling=sampling, progress=progress)
        left = self.samples(header.samples, header.rate)
        for rows_RCS in self.x0_to_blocks(x0_RCT):
            audio = channels_of(rows_RCS[..., :left], header)
            left -= audio.shape[-1]
            yield audio

    def decoder(self, *, seed: int = 0, sampling: Sampling | None = None) -> LiveDecoder:
        """Return a decoder that takes a stream's bytes as they come, and gives the audio of `decode` part by part."""
        return LiveDecoder(self, seed=seed, sampling=sampling or self.config.sampling)

    def row_seeds(self, header: Header, seed: int) -> list[int]:
        """Return the seeds of the noise that the rows of a stream start from."""
        offset = _SIDE_SEED_OFFSET if header.layout == "mid_side" else 0
        return [seed + row * offset for row in range(header.rows)]

    def require_own(self, header: Header) -> None:
        """Raise ValueError unless this codec's model wrote the stream."""
        quantizer = self.fitted_quantizer()
        if header.model != self.model_hash[:8]:
            raise ValueError(
                f"the stream was made by model {header.model}, but this codec is model {self.model_hash[:8]}: "
                "decode it with the codec that encoded it"
            )
        if header.size != quantizer.size or header.books > quantizer.books or not header.samples:
            raise ValueError(
                f"the stream is damaged: its header claims {header.samples} samples and {header.books} books of "
                f"{header.size} codewords, but this codec has {quantizer.books} books of {quantizer.size}"
            )

    def coder(self) -> Coder | None:
        """Return the entropy coder for `.spr` files; None if the codec has no prior."""
        return None if self.prior is None else self.prior.coder()

    def fitted_quantizer(self) -> Quantizer:
        """Return the quantizer; raise ValueError if the codec has none yet."""
        if self.quantizer is None:
            raise ValueError("this codec has no quantizer yet: run the stages quantize and finetune first")
        return self.quantizer

    # --- audio ↔ z ------------------------------------------------------------------------------------------------

    def audio_to_z(self, audio_B1S: Tensor) -> Tensor:
        """Encode levelled audio (B, channels of the AudioAE, samples) to z (B, Z, ⌈samples / (hop · pooling)⌉)."""
        x0_BCT = self.autoencoder.encode(audio_B1S.to(self.device))
        return self.x0_to_z(x0_BCT, self.z_frames(audio_B1S.shape[-1]))

    def x0_to_z(self, x0_BCT: Tensor, z_frames: int) -> Tensor:
        """Encode latents of any length to z (B, Z, z_frames), in windows that overlap by nearly half.

        Near its ends a window lacks context, so the outer quarter at each end is taken from the neighbouring window.
        """
        pooling, window = self.config.latent_encoder.pooling, self.config.window
        margin = windows.margin_of(window, pooling)
        x0_BCT = resize(x0_BCT, z_frames * pooling)
        return windows.encode(self.g, x0_BCT, window=window, pooling=pooling, margin=margin)

    def z_to_audio(
        self,
        z_BZN: Tensor | None,
        noise_BCT: Tensor,
        *,
        sampling: Sampling | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Decode z to levelled audio (B, channels of the AudioAE, T · hop), starting from `noise_BCT`.

        z = None samples unconditionally.
        """
        x0_BCT = self.z_to_x0(z_BZN, noise_BCT, sampling=sampling, progress=progress)
        return torch.cat(list(self.x0_to_blocks(x0_BCT)), dim=-1)

    def x0_to_blocks(self, x0_BCT: Tensor) -> Iterator[Tensor]:
        """Decode x0 to T · hop samples of levelled audio, yielded in blocks (B, channels of the AudioAE, …)."""
        # n frames that are centred on hop boundaries span n - 1 hops, so the last frame is repeated for the last hop
        return self.autoencoder.decode_blocks(resize(x0_BCT, x0_BCT.shape[-1] + self.autoencoder.surplus_frames))

    def z_to_x0(
        self,
        z_BZN: Tensor | None,
        noise_BCT: Tensor,
        *,
        sampling: Sampling | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Decode z to x0 with D; latents longer than 1.5 windows are decoded by `models.windows.JointWindows`."""
        steps = steps_of(self, sampling or self.config.sampling, conditional=z_BZN is not None)
        if windows.takes_one_window(noise_BCT.shape[-1], self.config.window):
            conditions = {} if z_BZN is None else {"condition": self.f(z_BZN)}
            return decode_steps(steps, self.dit, noise_BCT, conditions, progress=progress)
        joint = self.joint_windows()

        def stepped(done: int, total: int) -> None:
            joint.step = done
            if progress is not None:
                progress(done, total)

        conditions = {} if z_BZN is None else {"condition": z_BZN}
        return decode_steps(steps, joint, noise_BCT, conditions, progress=stepped)

    def joint_windows(self) -> windows.JointWindows:
        """Return D and f as one network for latents of any length."""
        window, pooling = self.config.window, self.config.latent_encoder.pooling
        return windows.JointWindows(self.dit, self.f, window=window, pooling=pooling)

    def noise(self, seeds: list[int], z_frames: int) -> Tensor:
        """Draw standard gaussian noise (len(seeds), C, z_frames · pooling), one row per seed, equal on all devices."""
        shape = (self.autoencoder.latent_channels, z_frames * self.config.latent_encoder.pooling)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.device)

    # --- weights in and out ---------------------------------------------------------------------------------------

    def parts(self) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
        """Return the parts that are each saved as one file: name → module and its config."""
        shapes = dataclasses.asdict(self.config.latent_encoder)
        parts: dict[str, tuple[nn.Module, dict[str, Any]]] = {
            "latent_encoder": (self.g, shapes),
            "upsampler": (self.f, shapes),
        }
        if self.quantizer is not None:
            parts["quantizer"] = (self.quantizer, self.quantizer.config())
        if self.prior is not None:
            parts["prior"] = (self.prior, self.prior.config())
        if self.distilled is not None:
            parts["distilled"] = (self.distilled, self.distilled.config())
        return parts

    def add_distilled(self, distilled: Distilled) -> None:
        """Give D a second adapter, which starts as a copy of the first, and with which it decodes in few steps."""
        if distilled.width != self.dit.config.width:
            raise ValueError(f"the distilled part is for a D of width {distilled.width}, not {self.dit.config.width}")
        self.distilled = distilled
        add_distilled(self.dit, self.config.lora)

    def save_pretrained(self, folder: Path, *, base: Path, card: str) -> str:
        """Write the codec to `folder` and return the model's hash.

        Args:
            folder: the export's folder, which appears whole or not at all; an older export there is replaced.
            base: D's pretrained weights. A file is linked or copied into the export; a release is only referred to, by
                its path or its name on the hub.
            card: text of the model card; `{model}` in it is replaced by the first 8 digits of the hash.
        """
        self.model_hash = identity.model_hash(self)
        export.write_export(
            folder,
            parts=self.parts(),
            adapter=file_tensors(self.dit),
            distilled=file_tensors(self.dit, DISTILLED),
            lora=file_config(self.config.lora, self.dit),
            base=base,
            description={
                "model": self.model_hash,
                "base_hash": self.base_hash,
                "autoencoder_identity": self.autoencoder.identity(),
                "config": dataclasses.asdict(self.config),
                "parts": identity.part_hashes(self),
            },
            card=card.replace("{model}", self.model_hash[:8]),
        )
        return self.model_hash

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        base: str | Path | None = None,
        autoencoder: str | Path | None = None,
    ) -> SPresso:
        """Load an export.

        Args:
            folder: a folder that `save_pretrained` wrote, or the name of one on the hub, `owner/name[@revision]`.
            device: the device to load the weights to.
            base: D's pretrained weights, if they are no longer where the export says.
            autoencoder: the folder of the AudioAE's release, likewise.

        Raises:
            ValueError: the export is missing or damaged, its weights are not those that its hash was made of, or the
                codec was trained on another base model or autoencoder.
        """
        folder = export.find_export(folder)
        description, config = export.read_description(folder), export.read_config(folder)
        if autoencoder is not None:
            config.autoencoder["folder"] = str(autoencoder)
        base_path = export.locate_base(folder, base)
        dit = load_dit(base_path)
        export.require_sizes(folder, config, dit)
        codec = cls(config, autoencoder=load_autoencoder(**config.autoencoder), dit=dit)
        _require_same("the base model", base_path, codec.base_hash, description["base"]["hash"])
        _require_same(
            "the autoencoder", config.autoencoder, codec.autoencoder.identity(), description["autoencoder_identity"]
        )
        codec.quantizer = export.read_part(folder, "quantizer", make_quantizer)
        codec.prior = export.read_part(folder, "prior", lambda config: Prior(**config))
        load_file_tensors(codec.dit, export.read_adapter(folder, file_tensors(codec.dit)))
        if (distilled := export.read_part(folder, "distilled", lambda config: Distilled(**config))) is not None:
            codec.add_distilled(distilled)
            adapter = export.read_adapter(folder / "distilled", file_tensors(codec.dit, DISTILLED))
            load_file_tensors(codec.dit, adapter, DISTILLED)
        export.fill_parts(folder, codec.parts())
        codec.model_hash = identity.model_hash(codec, description["config"])
        parts = identity.part_hashes(codec)
        recorded = {"the model": description["model"], **description.get("parts", parts)}  # older exports lack `parts`
        export.require_hashes(folder, {"the model": codec.model_hash, **parts}, recorded)
        return codec.to(device).eval().requires_grad_(False)

    def adapter_parameters(self, adapter: str = ADAPTER) -> dict[str, nn.Parameter]:
        """Return an adapter's trained parameters by their names in D."""
        return adapter_parameters(self.dit, adapter)


def _require_same(what: str, where: object, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"{what} at {where} is not the one that the codec was trained on (hash {found[:8]}, not {expected[:8]}): "
            f"restore it, or give the codec that was trained on it"
        )
