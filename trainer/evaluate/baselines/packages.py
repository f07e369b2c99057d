"""Music2Latent and SemantiCodec, through their own optional packages.

Both packages download their weights as pickles. An environment variable makes torch load only tensors from them.
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
from trainer.evaluate.baselines.baseline import Baseline, why_not_installed

_ONLY_TENSORS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class Music2Latent(Baseline):
    """A consistency autoencoder (arXiv 2408.06500): continuous, 44.1 kHz, 64 channels at 10.8 Hz."""

    name, title, licence = "music2latent", "Music2Latent", "CC BY-NC 4.0: not for commercial use"
    rates: ClassVar[tuple[float, ...]] = ()
    default_kbps = None
    sample_rate = 44_100
    _UNIT = 4096  # samples of a latent; the package cuts off an incomplete last one

    def missing(self) -> str:
        """Return how to install the package if it is missing."""
        return why_not_installed("music2latent", "pip install music2latent")

    def load(self, device: torch.device) -> None:
        """Load the model from `weights` (a file music2latent.pt or its folder), or as the package does by default."""
        from music2latent import EncoderDecoder

        path = None if self.weights is None else Path(self.weights)
        if path is not None and path.is_dir():
            path = path / "music2latent.pt"
        with _only_tensors():
            self.model = EncoderDecoder(load_path_inference=None if path is None else str(path), device=device)

    def run(self, audio_S: Audio) -> tuple[Audio, int | None]:
        """Code audio with at least two units of silence appended, so that nothing is cut off."""
        latents = self.model.encode(np.pad(audio_S, (0, -len(audio_S) % self._UNIT + 2 * self._UNIT)))
        return torch.as_tensor(self.model.decode(latents)).float().cpu().reshape(-1).numpy(), None


class SemantiCodec(Baseline):
    """Semantic tokens and a diffusion decoder (arXiv 2405.00233): 16 kHz, 0.31 to 1.4 kbps."""

    name, title, licence = "semanticodec", "SemantiCodec", "MIT"
    rates = (0.31, 0.33, 0.34, 0.35, 0.63, 0.65, 0.68, 0.7, 1.25, 1.3, 1.35, 1.4)
    default_kbps = 1.4
    sample_rate = 16_000
    _ACOUSTIC_BITS = 13  # each semantic code comes with one of 8192 acoustic codes

    def missing(self) -> str:
        """Return how to install the package, or torchaudio, which the package reads files with."""
        install = (
            "pip install git+https://github.com/haoheliu/SemantiCodec-inference, and a torchaudio that matches torch"
        )
        return why_not_installed("semanticodec", install) or why_not_installed("torchaudio", install)

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens per second and the size of the semantic vocabulary, by which the package names a rate."""
        number = self.rates.index(self.kbps or self.rates[-1])
        return (25, 50, 100)[number // 4], 4096 << number % 4

    def load(self, device: torch.device) -> None:
        """Load the model from `weights` (a folder like its hub repository), or as the package does by default.

        The package chooses the device itself.
        """
        from semanticodec import SemantiCodec as Model

        rate, vocabulary = self.tokens
        options = {} if self.weights is None else {"cache_path": self.weights}
        with _only_tensors():
            self.model = Model(token_rate=rate, semantic_vocab_size=vocabulary, **options)

    def run(self, audio_S: Audio) -> tuple[Audio, int | None]:
        """Code audio through a file, which the package requires; a token is a semantic and an acoustic code."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.wav"
            write_audio(path, audio_S[None], self.sample_rate)
            tokens_1T2 = self.model.encode(str(path))
        decoded = torch.as_tensor(self.model.decode(tokens_1T2)).float().cpu().reshape(-1).numpy()
        semantic_bits = math.log2(self.tokens[1])
        return decoded, math.ceil(tokens_1T2.shape[1] * (semantic_bits + self._ACOUSTIC_BITS))


@contextlib.contextmanager
def _only_tensors() -> Iterator[None]:
    """Make `torch.load` refuse pickles that hold more than tensors."""
    before = os.environ.get(_ONLY_TENSORS)
    os.environ[_ONLY_TENSORS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ONLY_TENSORS]
        else:
            os.environ[_ONLY_TENSORS] = before
