"""The audio embedding of CLAP, from transformers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.disk_errors import require_sound_disk
from trainer.evaluate.baselines.baseline import offline, resample_mono, why_not_installed
from trainer.evaluate.embeddings.embedding import Embedding

CLAP = "clap:"


class Clap(Embedding):
    """The audio embedding of CLAP (arXiv 2211.06687), loaded from a folder or by its name on the hub."""

    def __init__(self, where: str, device: torch.device) -> None:
        self.where, self.device, self.name = where, device, f"CLAP {where.rstrip('/').rpartition('/')[2]}"
        self.identity = f"{CLAP}{where}"
        self.note = f"the audio embedding of {self.name}, with one row for every ten seconds or part of them."

    @functools.cached_property
    def _parts(self) -> tuple[Any, Any]:
        if missing := why_not_installed("transformers", "pip install 'spresso[baselines]'"):
            raise ValueError(f"evaluate.embedding={CLAP}{self.where}: {missing}")
        from transformers import ClapFeatureExtractor, ClapModel

        try:
            local: dict[str, Any] = {"local_files_only": Path(self.where).exists() or offline()}
            extractor = ClapFeatureExtractor.from_pretrained(self.where, trust_remote_code=False, **local)
            model: torch.nn.Module = ClapModel.from_pretrained(
                self.where, use_safetensors=True, trust_remote_code=False, **local
            )
        except (OSError, ValueError) as error:
            if Path(self.where).exists():
                require_sound_disk(error)
            first = str(error).splitlines()[0]
            raise ValueError(
                f"evaluate.embedding={CLAP}{self.where} can't be loaded ({first}): give a folder with config.json, "
                f"preprocessor_config.json and model.safetensors, run `hf download {self.where}`, or leave the key out"
            ) from None
        return extractor, model.to(self.device).eval()

    def __call__(self, audio_1S: Tensor, sample_rate: int) -> Tensor:
        """Embed one clip in windows of the model's longest input.

        The extractor repeats a shorter window until it is full, as in CLAP's training.
        """
        extractor, model = self._parts
        audio_S = resample_mono(audio_1S[0].cpu().numpy(), sample_rate, extractor.sampling_rate)
        longest = int(extractor.max_length_s * extractor.sampling_rate)
        parts = [np.ascontiguousarray(audio_S[at : at + longest]) for at in range(0, max(1, len(audio_S)), longest)]
        inputs = extractor(
            parts, sampling_rate=extractor.sampling_rate, truncation="rand_trunc", return_tensors="pt"
        ).to(self.device)
        return model.get_audio_features(**inputs).pooler_output.float().cpu()
