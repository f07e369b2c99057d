"""Codec 2, by the libcodec2 that is in the wheel of the package `pycodec2`."""

from __future__ import annotations

import numpy as np
import torch

from trainer.data.audio import Audio
from trainer.evaluate.baselines.baseline import Baseline, why_not_installed


class Codec2(Baseline):
    """A parametric codec of speech at 8 kHz: sinusoids of one pitch and their envelope, in frames of 20 or 40 ms.

    The rate of 0.45 kbps, which libcodec2 1.0 had, is no longer in the library.
    """

    name, title, licence = "codec2", "Codec 2 (speech, 8 kHz)", "LGPL 2.1 (libcodec2); BSD (pycodec2)"
    rates = (0.7, 1.2, 1.3, 1.4, 1.6, 2.4, 3.2)
    default_kbps = 0.7
    sample_rate = 8000

    def missing(self) -> str:
        """Return how to install the package if it is missing."""
        return why_not_installed("pycodec2", "pip install pycodec2")

    def load(self, device: torch.device) -> None:
        """Load the library, so that it is known to be usable."""
        import pycodec2  # noqa: F401

        # The waveform is not preserved; these are the measured lags of its envelope.
        self.delay = 213 if self.kbps == 0.7 else 160

    def run(self, audio_S: Audio) -> tuple[Audio, int | None]:
        """Code audio padded by the delay and to whole frames; bits that fill up a frame's last byte do not count."""
        import pycodec2

        assert self.kbps is not None
        encoder, decoder = (pycodec2.Codec2(round(1000 * self.kbps)) for _ in range(2))
        samples = encoder.samples_per_frame()
        padded_S = np.pad(audio_S, (0, self.delay + -(len(audio_S) + self.delay) % samples))
        frames = np.clip(np.rint(padded_S * 2**15), -(2**15), 2**15 - 1).astype(np.int16).reshape(-1, samples)
        decoded = np.concatenate([decoder.decode(encoder.encode(frame)) for frame in frames])
        return (decoded / 2**15).astype(np.float32), len(frames) * encoder.bits_per_frame()
