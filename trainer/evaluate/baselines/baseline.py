"""The interface of a codec by others: its names, its rates, and audio → bits → audio."""

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

_PATIENCE = 10.0  # seconds to wait for the hub's answer


class Baseline(ABC):
    """A codec by others at one of its rates."""

    name: ClassVar[str]
    """The name in `evaluate.baselines`."""
    title: ClassVar[str]
    licence: ClassVar[str]
    """The licence of code and weights, which the tables show."""
    rates: ClassVar[tuple[float, ...]]
    """Nominal rates in kbps; empty if the latents are continuous."""
    default_kbps: ClassVar[float | None]
    """The rate on the paper's page; None if the latents are continuous."""
    sample_rate: int
    """The codec's own sample rate in Hz."""
    delay: int = 0
    """Samples at `sample_rate` by which the output lags behind the input."""

    def __init__(self, kbps: float | None, weights: str | None = None) -> None:
        """Store the arguments, see `make_baseline`; nothing is loaded yet."""
        self.kbps, self.weights = kbps, weights

    @property
    def spec(self) -> str:
        """The codec's name and rate as a recipe writes them."""
        return self.name if self.kbps is None else f"{self.name}@{self.kbps:g}"

    @abstractmethod
    def missing(self) -> str:
        """Return one line that says what is missing and how to get it; empty if the codec can be loaded now."""

    @property
    def fetches(self) -> bool:
        """Whether `load` may download what `missing` names."""
        return False

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Load the model, so that `code` can be called.

        Raises:
            Exception: any error of the codec's own package.
        """

    @abstractmethod
    def run(self, audio_S: Audio) -> tuple[Audio, int | None]:
        """Encode and decode mono audio (samples,) at `sample_rate`.

        Returns:
            Decoded audio of any length, and the bits of the payload, or None for continuous latents.
        """

    @torch.inference_mode()
    def code(self, audio_S: Audio, sample_rate: int) -> tuple[Audio, int | None]:
        """Pass mono audio (samples,) of any sample rate through the codec.

        The audio is resampled both ways, the codec's delay is removed, and the end is cut or padded with silence.

        Returns:
            Audio of the same rate and length, aligned with the input, and the bits of the payload without containers,
            or None for continuous latents.
        """
        decoded, bits = self.run(resample_mono(audio_S, sample_rate, self.sample_rate))
        back = resample_mono(decoded[self.delay :].astype(np.float32), self.sample_rate, sample_rate)[: len(audio_S)]
        return np.pad(back, (0, len(audio_S) - len(back))), bits


def resample_mono(audio_S: Audio, rate: int, to: int) -> Audio:
    """Resample (samples,) from `rate` to `to` Hz with linear phase and no delay."""
    return audio_S if rate == to else soxr.resample(audio_S, rate, to)


def padded(audio_S: Audio, unit: int, device: torch.device) -> torch.Tensor:
    """Pad audio with silence at the end to a multiple of `unit`: (1, 1, samples)."""
    return F.pad(torch.from_numpy(audio_S), (0, -len(audio_S) % unit))[None, None].to(device)


def why_not_installed(package: str, install: str) -> str:
    """Return one line that says how to install a missing package; empty if the package is installed."""
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed: {install}"
    return ""


def offline() -> bool:
    """Whether the hub can't be used: the environment forbids it, or the hub does not answer.

    The hub is tried only once, because its own client would retry each file for a minute.
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
        return True  # any status is an answer
    except (OSError, ValueError):
        return False
