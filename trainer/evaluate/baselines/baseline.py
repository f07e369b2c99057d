"""What a codec by others has to be to stand in a table: its names, its rates, and audio → bits → audio."""

from __future__ import annotations

import functools
import importlib.util
import os
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import soxr
import torch
from torch.nn import functional as F

from trainer.data.audio import Audio

_PATIENCE = 10.0  # seconds for the hub to answer


class Baseline(ABC):
    """A codec by others at one of its rates."""

    name: ClassVar[str]
    """As in `evaluate.baselines`."""
    title: ClassVar[str]
    licence: ClassVar[str]
    """Of code and weights, to be shown."""
    rates: ClassVar[tuple[float, ...]]
    """Nominal, in kbps; empty where the latents are continuous."""
    default_kbps: ClassVar[float | None]
    """The rate of the paper's page."""
    sample_rate: int
    """In Hz, of what the codec itself sees."""
    delay: int = 0
    """Samples at that rate by which its output lags behind its input."""

    def __init__(self, kbps: float | None, weights: str | None = None) -> None:
        """Loads nothing yet; see `make_baseline`."""
        self.kbps, self.weights = kbps, weights

    @property
    def spec(self) -> str:
        """What names it in a recipe."""
        return self.name if self.kbps is None else f"{self.name}@{self.kbps:g}"

    @abstractmethod
    def missing(self) -> str:
        """What is missing, in one line with its mend; empty where the codec can be loaded from what is here."""

    @property
    def fetches(self) -> bool:
        """Whether `load` may get what `missing` names from the network."""
        return False

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Make ready for `code`.

        Raises:
            Exception: whatever the codec's own code raises; nothing can be said of it.
        """

    @abstractmethod
    def run(self, audio_S: Audio) -> tuple[Audio, int | None]:
        """Mono at `sample_rate`, there and back, of any length; and the bits of its payload, None where it has none."""

    @torch.inference_mode()
    def code(self, audio_S: Audio, sample_rate: int) -> tuple[Audio, int | None]:
        """Mono audio (samples,) of any rate through the codec.

        Returns:
            Audio of the same rate and length, in time with the original: resampled both ways, the codec's delay taken
            off, cut or filled with silence at the end. And the bits of the payload, containers aside; None where the
            codec has continuous latents.
        """
        decoded, bits = self.run(resample_mono(audio_S, sample_rate, self.sample_rate))
        back = resample_mono(decoded[self.delay :].astype(np.float32), self.sample_rate, sample_rate)[: len(audio_S)]
        return np.pad(back, (0, len(audio_S) - len(back))), bits


def resample_mono(audio_S: Audio, rate: int, to: int) -> Audio:
    """Linear in phase: nothing is delayed."""
    return audio_S if rate == to else soxr.resample(audio_S, rate, to)


def padded(audio_S: Audio, unit: int, device: torch.device) -> torch.Tensor:
    """With silence at the end, up to a multiple of `unit`: (1, 1, samples)."""
    return F.pad(torch.from_numpy(audio_S), (0, -len(audio_S) % unit))[None, None].to(device)


def lacks(package: str, install: str) -> str:
    """A line where a package is not installed, else nothing."""
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed: {install}"
    return ""


def offline() -> bool:
    """Whether the hub is not to be asked: the environment says so, or it does not answer, which is tried once.

    Its own client would try again for a minute at each file.
    """
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names):
        return True
    return not _answers(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


@functools.cache
def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PATIENCE):
            return True
    except urllib.error.HTTPError:
        return True  # whatever it says
    except (OSError, ValueError):
        return False
