"""What the distances between sets of clips are taken over."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.evaluate.baselines.baseline import lacks, offline, resample_mono
from trainer.evaluate.figures import EMBEDDING, mel_statistics

CLAP = "clap:"


class Embedding(ABC):
    """Audio → rows of numbers in which likeness is nearness."""

    name: str
    """To be named wherever a figure over it is shown."""
    note: str

    @abstractmethod
    def __call__(self, audio_1S: Tensor, sample_rate: int) -> Tensor:
        """One clip (1, samples) → (windows, dim), float32 on the CPU."""


class MelStatistics(Embedding):
    """`trainer.evaluate.figures.mel_statistics`: no weights."""

    name = EMBEDDING
    note = f"the {EMBEDDING} embedding: means and deviations of a log-mel spectrogram in half-second windows."

    def __call__(self, audio_1S: Tensor, sample_rate: int) -> Tensor:
        """A row a half second."""
        return mel_statistics(audio_1S, sample_rate).float().cpu()


class Clap(Embedding):
    """CLAP's audio tower (arXiv 2211.06687), from a folder or by a name in the hub's cache."""

    def __init__(self, where: str, device: torch.device) -> None:
        self.where, self.device, self.name = where, device, f"CLAP {where.rstrip('/').rpartition('/')[2]}"
        self.note = f"the audio embedding of {self.name}, a row for each ten seconds begun."

    @functools.cached_property
    def _parts(self) -> tuple[Any, Any]:
        if missing := lacks("transformers", "pip install 'spresso[baselines]'"):
            raise ValueError(f"evaluate.embedding={CLAP}{self.where}: {missing}")
        from transformers import ClapFeatureExtractor, ClapModel

        try:
            local: dict[str, Any] = {"local_files_only": Path(self.where).exists() or offline()}
            extractor = ClapFeatureExtractor.from_pretrained(self.where, **local)
            model: torch.nn.Module = ClapModel.from_pretrained(self.where, use_safetensors=True, **local)
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise ValueError(
                f"evaluate.embedding={CLAP}{self.where} can't be loaded ({first}): give a folder with config.json, "
                f"preprocessor_config.json and model.safetensors, or run `hf download {self.where}`; or leave it out"
            ) from None
        return extractor, model.to(self.device).eval()

    def __call__(self, audio_1S: Tensor, sample_rate: int) -> Tensor:
        """Windows as long as the model's longest input; a shorter one is repeated to fill it, as it was in training."""
        extractor, model = self._parts
        audio_S = resample_mono(audio_1S[0].cpu().numpy(), sample_rate, extractor.sampling_rate)
        longest = int(extractor.max_length_s * extractor.sampling_rate)
        parts = [np.ascontiguousarray(audio_S[at : at + longest]) for at in range(0, max(1, len(audio_S)), longest)]
        inputs = extractor(
            parts, sampling_rate=extractor.sampling_rate, truncation="rand_trunc", return_tensors="pt"
        ).to(self.device)
        return model.get_audio_features(**inputs).pooler_output.float().cpu()


def make_embedding(choice: str, device: torch.device) -> Embedding:
    """By `evaluate.embedding`: `mel-stat`, or `clap:` and a folder or name."""
    return Clap(choice.removeprefix(CLAP), device) if choice.startswith(CLAP) else MelStatistics()
