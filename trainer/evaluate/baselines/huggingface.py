"""DAC, EnCodec and the Stable Audio VAE from transformers and diffusers. Only safetensors files are read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch

from trainer.data.audio import Audio
from trainer.evaluate.baselines.baseline import Baseline, offline, padded, why_not_installed

_INSTALL = "pip install 'spresso[baselines]'"


class _FromHub(Baseline):
    """A codec whose weights come from a folder, or by their name from the hub or its cache."""

    hub: ClassVar[str]
    folder_in_hub: ClassVar[str] = ""
    package: ClassVar[str]
    model: Any

    def missing(self) -> str:
        """Return what is missing: a package, files of the folder, or the weights in the hub's cache."""
        if missing := why_not_installed(self.package, _INSTALL):
            return missing
        if self.weights is not None:
            if (Path(self.weights) / "config.json").is_file() and any(Path(self.weights).glob("*.safetensors")):
                return ""
            return f"evaluate.weights.{self.name}={self.weights} holds no config.json with *.safetensors"
        from huggingface_hub import try_to_load_from_cache

        inside = f"{self.folder_in_hub}/" if self.folder_in_hub else ""
        if isinstance(try_to_load_from_cache(self.hub, f"{inside}config.json"), str):
            return ""
        return (
            f"the weights {self.hub} are not in the hub's cache: run `hf download {self.hub}` with network access, "
            f"or set evaluate.weights.{self.name}=FOLDER"
        )

    @property
    def fetches(self) -> bool:
        """Whether `load` may download the weights from the hub."""
        return self.weights is None and not offline() and not why_not_installed(self.package, _INSTALL)

    def _load(self, kind: Any, device: torch.device) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()  # the bar would break our own progress line
        options: dict[str, Any] = {"local_files_only": self.weights is not None or offline()}
        if self.folder_in_hub and self.weights is None:
            options["subfolder"] = self.folder_in_hub
        # diffusers, which never runs a folder's code for a class of its own, takes no note of trust_remote_code
        model = kind.from_pretrained(self.weights or self.hub, use_safetensors=True, trust_remote_code=False, **options)
        self.model = model.to(device).eval()
        self.sample_rate = self.model.config.sampling_rate


class DAC(_FromHub):
    """Descript's audio codec (arXiv 2306.06546): 44.1 kHz, up to 9 codebooks of 1024 entries at 86 Hz."""

    name, title, licence = "dac", "DAC", "MIT"
    rates = tuple(round(0.8613 * books, 1) for books in range(1, 10))
    default_kbps = 1.7
    hub, package = "descript/dac_44khz", "transformers"

    def load(self, device: torch.device) -> None:
        """Load the model from `weights` or the hub."""
        from transformers import DacModel

        self._load(DacModel, device)
        config = self.model.config
        self.hop, self.code_bits = config.hop_length, math.log2(config.codebook_size)
        assert self.kbps is not None
        self.books = max(1, round(1000 * self.kbps * self.hop / (self.sample_rate * self.code_bits)))
        if self.books > config.n_codebooks:
            raise ValueError(
                f"{self.spec} needs {self.books} codebooks, these weights have {config.n_codebooks}: lower the rate"
            )

    def run(self, audio_S: Audio) -> tuple[Audio, int | None]:
        """Code audio padded to whole frames, whose bits all count."""
        audio_11S = padded(audio_S, self.hop, self.model.device)
        codes_1MT = self.model.encode(audio_11S, n_quantizers=self.books).audio_codes
        decoded_1S = self.model.decode(audio_codes=codes_1MT).audio_values
        return decoded_1S[0].cpu().numpy(), math.ceil(codes_1MT.numel() * self.code_bits)


class EnCodec(_FromHub):
    """Meta's codec (arXiv 2210.13438): 24 kHz, codebooks of 1024 entries at 75 Hz."""

    name, title, licence = "encodec", "EnCodec", "MIT (code); its weights' own card"
    rates = (1.5, 3.0, 6.0, 12.0, 24.0)
    default_kbps = 1.5
    hub, package = "facebook/encodec_24khz", "transformers"

    def load(self, device: torch.device) -> None:
        """Load the model from `weights` or the hub."""
        from transformers import EncodecModel

        self._load(EncodecModel, device)

    def run(self, audio_S: Audio) -> tuple[Audio, int | None]:
        """Code audio; the bits include 32 for the scale of each chunk if the model normalizes chunks."""
        config = self.model.config
        audio_1CS = padded(audio_S, config.hop_length, self.model.device).expand(-1, config.audio_channels, -1)
        encoded = self.model.encode(audio_1CS, bandwidth=self.kbps)
        decoded_1CS = self.model.decode(
            encoded.audio_codes, encoded.audio_scales, last_frame_pad_length=encoded.last_frame_pad_length or 0
        ).audio_values
        chunks, _, books, frames = encoded.audio_codes.shape
        codes = books * (chunks * frames - (encoded.last_frame_pad_length or 0))
        scales = sum(scale.numel() for scale in encoded.audio_scales if scale is not None)
        return decoded_1CS[0].mean(0).cpu().numpy(), math.ceil(codes * math.log2(config.codebook_size)) + 32 * scales


class StableAudio(_FromHub):
    """The VAE of Stable Audio Open (arXiv 2407.14358): continuous, 44.1 kHz stereo, 64 channels at 21.5 Hz."""

    name, title, licence = "stable_audio", "Stable Audio VAE", "Stability AI Community License"
    rates: ClassVar[tuple[float, ...]] = ()
    default_kbps = None
    hub, folder_in_hub, package = "stabilityai/stable-audio-open-1.0", "vae", "diffusers"

    def load(self, device: torch.device) -> None:
        """Load the model from `weights` or the hub."""
        from diffusers import AutoencoderOobleck

        self._load(AutoencoderOobleck, device)
        self.hop = math.prod(self.model.config.downsampling_ratios)

    def run(self, audio_S: Audio) -> tuple[Audio, int | None]:
        """Code the mono audio in every channel and average the channels; latents are the mode, not a sample."""
        audio_1CS = padded(audio_S, self.hop, self.model.device)
        audio_1CS = audio_1CS.expand(-1, self.model.config.audio_channels, -1)
        latents = self.model.encode(audio_1CS).latent_dist.mode()
        return self.model.decode(latents).sample[0].mean(0).cpu().numpy(), None
