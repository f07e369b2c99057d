"""Music2Latent and SemantiCodec, by their own packages, which nobody has to install.

Both fetch their weights themselves, as pickles: torch is told to read tensors from them and nothing else.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from trainer.data.audio import Audio, write_audio
from trainer.evaluate.baselines.baseline import Baseline, lacks

_ONLY_TENSORS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class Music2Latent(Baseline):
    """A consistency autoencoder (arXiv 2408.06500): continuous, 44.1 kHz, 64 channels at 10.8 Hz."""

    name, title, licence = "music2latent", "Music2Latent", "CC BY-NC 4.0: not for commercial use"
    rates: ClassVar[tuple[float, ...]] = ()
    default_kbps = None
    sample_rate = 44_100
    _UNIT = 4096  # samples to a latent; what fills none is cut off by the package

    def missing(self) -> str:
        """The package is missing."""
        return lacks("music2latent", "pip install music2latent")

    def load(self, device: torch.device) -> None:
        """From `weights`, a file music2latent.pt or its folder, or as the package does."""
        from music2latent import EncoderDecoder

        path = None if self.weights is None else Path(self.weights)
        if path is not None and path.is_dir():
            path = path / "music2latent.pt"
        with _only_tensors():
            self.model = EncoderDecoder(load_path_inference=None if path is None else str(path), device=device)

    def run(self, audio_S: Audio) -> tuple[Audio, int | None]:
        """Two units of silence behind, so that nothing is cut off."""
        latents = self.model.encode(np.pad(audio_S, (0, -len(audio_S) % self._UNIT + 2 * self._UNIT)))
        return torch.as_tensor(self.model.decode(latents)).float().cpu().reshape(-1).numpy(), None


class SemantiCodec(Baseline):
    """Semantic tokens and a diffusion decoder (arXiv 2405.00233): 16 kHz, 0.31 to 1.4 kbps."""

    name, title, licence = "semanticodec", "SemantiCodec", "MIT"
    rates = (0.31, 0.33, 0.34, 0.35, 0.63, 0.65, 0.68, 0.7, 1.25, 1.3, 1.35, 1.4)
    default_kbps = 1.4
    sample_rate = 16_000
    _ACOUSTIC_BITS = 13  # of the 8192 codes beside each semantic one

    def missing(self) -> str:
        """The package, or torchaudio, which it reads files with, is missing."""
        install = (
            "pip install git+https://github.com/haoheliu/SemantiCodec-inference, with a torchaudio that fits torch"
        )
        return lacks("semanticodec", install) or lacks("torchaudio", install)

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens a second and the size of the semantic vocabulary, as the package names a rate."""
        number = self.rates.index(self.kbps or self.rates[-1])
        return (25, 50, 100)[number // 4], 4096 << number % 4

    def load(self, device: torch.device) -> None:
        """From `weights`, a folder as in its hub repository, or as the package does. It chooses the device itself."""
        from semanticodec import SemantiCodec as Model

        rate, vocabulary = self.tokens
        options = {} if self.weights is None else {"cache_path": self.weights}
        with _only_tensors():
            self.model = Model(token_rate=rate, semantic_vocab_size=vocabulary, **options)

    def run(self, audio_S: Audio) -> tuple[Audio, int | None]:
        """By way of a file, as the package wants it. A token is a semantic code and an acoustic one."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.wav"
            write_audio(path, audio_S[None], self.sample_rate)
            tokens_1T2 = self.model.encode(str(path))
        decoded = torch.as_tensor(self.model.decode(tokens_1T2)).float().cpu().reshape(-1).numpy()
        semantic_bits = math.log2(self.tokens[1])
        return decoded, math.ceil(tokens_1T2.shape[1] * (semantic_bits + self._ACOUSTIC_BITS))


@contextlib.contextmanager
def _only_tensors() -> Iterator[None]:
    before = os.environ.get(_ONLY_TENSORS)
    os.environ[_ONLY_TENSORS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ONLY_TENSORS]
        else:
            os.environ[_ONLY_TENSORS] = before
