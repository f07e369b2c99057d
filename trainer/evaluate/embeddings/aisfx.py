"""The embedding of sound effects that the package aisfx holds (Ma and Lerch, ISMIR 2022), weights included.

Only the weights of the package are used (CC BY 4.0). They are its model X-Sequential-CE: the network of the DCASE
baselines with nine convolution layers (arXiv 1808.00773), trained on nine libraries of sound effects.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.evaluate.baselines.baseline import resample_mono
from trainer.evaluate.embeddings.embedding import Embedding

VERSION = "0.1.2"
_INSTALL = f"pip install --no-deps aisfx=={VERSION}"  # with its dependencies, pip would look for numpy 1.23
_SHA256 = "499ea75909c932a2f94c35fa722fa4fabc5bcb7e84917209cc5f7402627b7eb5"

SAMPLE_RATE = 44_100
_WINDOW, _HOP, _BANDS = 2048, 1024, 96
_BLOCK, _STEP = 100, 50  # mel frames
_LOUDEST = 9.457798957824707  # the largest value of the training spectrograms, which are scaled to [0, 1]
_WIDTHS = (64, 128, 256, 512)


class Aisfx(Embedding):
    """512 numbers for each 2.3 s, every 1.2 s; an incomplete last block is left out, a short clip padded with silence.

    The audio is resampled to 44.1 kHz.
    """

    name = identity = f"aisfx {VERSION}"
    note = f"the embedding of sound effects by {name} (Ma and Lerch, ISMIR 2022), with a row of 512 numbers for 2.3 s."

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @staticmethod
    def missing() -> str:
        """Return one line that says how to install the weights; empty if they are here."""
        return "" if _weights() is not None else f"the package aisfx {VERSION} is not installed: {_INSTALL}"

    @functools.cached_property
    def _network(self) -> nn.Module:
        path = _weights()
        if path is None:
            raise ValueError(f"evaluate.embedding=aisfx: {self.missing()}")
        return load_network(path).to(self.device)

    def __call__(self, audio_1S: Tensor, sample_rate: int) -> Tensor:
        """Embed one clip."""
        audio_S = resample_mono(audio_1S[0].cpu().numpy(), sample_rate, SAMPLE_RATE)
        mel_TM = mel_spectrogram(torch.from_numpy(audio_S).to(self.device)) / _LOUDEST
        short = max(0, _BLOCK - len(mel_TM))
        blocks_BMT = F.pad(mel_TM, (0, 0, 0, short)).unfold(0, _BLOCK, _STEP)
        return self._network(blocks_BMT.transpose(1, 2)[:, None]).float().cpu()


def mel_spectrogram(audio_S: Tensor) -> Tensor:
    """Compute log10(1 + 10⁴ · energy) in 96 mel bands, as Essentia's MelBands does for aisfx: (S,) → (frames, 96).

    The audio is at 44.1 kHz. Frames of 2048 samples lie around every 1024th sample, from the first one to the one after
    the last. The Hann window is the symmetric one, and is not normalized.
    """
    frames = -(-len(audio_S) // _HOP) + 1
    end = (frames - 1) * _HOP + _WINDOW // 2
    padded = F.pad(audio_S, (_WINDOW // 2, end - len(audio_S)))
    window = torch.hann_window(_WINDOW, periodic=False, dtype=audio_S.dtype, device=audio_S.device)
    spectrum = torch.fft.rfft(padded.unfold(0, _WINDOW, _HOP) * window)
    power = spectrum.real.square() + spectrum.imag.square()
    return (1e4 * (power @ _filters().to(power).T) + 1).log10()


@functools.cache
def _filters() -> Tensor:
    """Return a filterbank (96, 1025): triangles linear in mel (HTK's scale) up to Nyquist, each normalized to sum 1."""
    hertz = torch.linspace(0, SAMPLE_RATE / 2, _WINDOW // 2 + 1, dtype=torch.float64)
    mel = (hertz / 700).log1p()  # the scale's factor cancels out
    edges = torch.linspace(0, float(mel[-1]), _BANDS + 2, dtype=torch.float64)[:, None]
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    triangles = torch.minimum((mel - lower) / (centre - lower), (upper - mel) / (upper - centre)).clamp(min=0)
    return triangles / triangles.sum(1, keepdim=True)


def load_network(path: Path) -> nn.Module:
    """Read the network from the package's checkpoint: (blocks, 1, 100 frames, 96 bands) → (blocks, 512).

    Nothing but tensors and numbers is unpickled.
    """
    # Beside the tensors the file holds the names of its training sets, numbered by numpy.
    scalar: Any = np.int64(0).__reduce__()[0]
    with torch.serialization.safe_globals(
        [(scalar, "numpy.core.multiarray.scalar"), np.dtype, codecs.encode, type(np.dtype(np.int64))]
    ):
        weights, _ = torch.load(path, map_location="cpu", weights_only=True)
    network = _Network()
    own = "embedding_net."
    network.load_state_dict({key.removeprefix(own): value for key, value in weights.items() if key.startswith(own)})
    return network.requires_grad_(False).eval()


class _Network(nn.Module):
    """Four blocks of two convolutions; the mean over the bands, then the maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(zip((1, *_WIDTHS), _WIDTHS, strict=False), start=1):
            self.add_module(f"conv_block{number}", _Convolutions(inputs, outputs, pool=2 if number < 4 else 1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x.mean(3).amax(2)


class _Convolutions(nn.Module):
    """Two 3 × 3 convolutions, each with batch normalization and ReLU, and a maximum over squares of `pool`."""

    def __init__(self, inputs: int, outputs: int, *, pool: int) -> None:
        super().__init__()
        self.pool = pool
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return F.max_pool2d(x, self.pool)


def _weights() -> Path | None:
    """Return the checkpoint of the installed package, which is not imported; None if there is none, or another one."""
    package = importlib.util.find_spec("aisfx")
    folders = [] if package is None else package.submodule_search_locations or []
    paths = [path for folder in folders if (path := Path(folder) / "models/checkpoint.pth").is_file()]
    return next((path for path in paths if hashlib.sha256(path.read_bytes()).hexdigest() == _SHA256), None)
