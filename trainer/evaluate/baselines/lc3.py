"""LC3 (ETSI TS 103 634), by the liblc3 that is in the wheel of the package `lc3py`."""

from __future__ import annotations

import numpy as np
import torch

from trainer.data.audio import Audio
from trainer.evaluate.baselines.baseline import Baseline, why_not_installed


class LC3(Baseline):
    """The codec of Bluetooth LE Audio, in frames of 10 ms, of which the shortest has 20 bytes.

    At 48 kHz, its log-mel distance is no larger than at any lower sample rate, at all of these bit rates.
    """

    name, title, licence = "lc3", "LC3", "Apache 2.0"
    rates = (16.0, 24.0, 32.0, 48.0, 64.0, 80.0, 96.0, 124.0)
    default_kbps = 16.0
    sample_rate = 48_000
    _FRAME_US = 10_000

    def missing(self) -> str:
        """Return how to install the package if it is missing."""
        return why_not_installed("lc3", "pip install lc3py")

    def load(self, device: torch.device) -> None:
        """Load the library, so that it is known to be usable."""
        import lc3

        self.delay = lc3.Encoder(self._FRAME_US, self.sample_rate).get_delay_samples()

    def run(self, audio_S: Audio) -> tuple[Audio, int | None]:
        """Code audio padded by the codec's delay and to whole frames, all of whose bytes count."""
        import lc3

        assert self.kbps is not None
        encoder, decoder = (kind(self._FRAME_US, self.sample_rate) for kind in (lc3.Encoder, lc3.Decoder))
        samples, size = encoder.get_frame_samples(), encoder.get_frame_bytes(round(1000 * self.kbps))
        padded_S = np.pad(audio_S, (0, self.delay + -(len(audio_S) + self.delay) % samples))
        packets = [encoder.encode(frame, size) for frame in padded_S.reshape(-1, samples)]
        decoded = [np.array(decoder.decode(packet), np.float32) for packet in packets]
        return np.concatenate(decoded), 8 * sum(map(len, packets))
