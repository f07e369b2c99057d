"""Opus (RFC 6716), by the libopus that is in the wheel of the package `av`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from trainer.data.audio import Audio
from trainer.evaluate.baselines.baseline import Baseline, why_not_installed

if TYPE_CHECKING:
    import av


class Opus(Baseline):
    """48 kHz, in frames of 60 ms, the longest that all versions know: the least overhead.

    4 kbps is libopus's lowest rate: a lower nominal one gives the same packets or, from about 2 kbps down, empty ones.
    Longer frames get by with less only where some of them are left empty.
    """

    name, title, licence = "opus", "Opus", "BSD (libopus); FFmpeg's own"
    rates = (4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0)
    default_kbps = 6.0
    sample_rate = 48_000

    def missing(self) -> str:
        """The package `av` cannot be imported."""
        return why_not_installed("av", "pip install av")

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def run(self, audio_S: Audio) -> tuple[Audio, int | None]:
        """Encoded and decoded in memory; the decoder takes off the delay that the encoder's header states."""
        packets, header = self._encode(audio_S)
        payload_bits = 8 * sum(packet.size for packet in packets)
        return _decode(packets, header)[: len(audio_S)], payload_bits

    def _encode(self, audio_S: Audio) -> tuple[list[av.Packet], bytes]:
        """Opus packets without a container, and the OpusHead header (RFC 7845, section 5.1)."""
        import av

        assert self.kbps is not None
        encoder = av.CodecContext.create("libopus", "w")
        encoder.sample_rate, encoder.layout, encoder.format = self.sample_rate, "mono", "flt"
        encoder.bit_rate = round(1000 * self.kbps)
        encoder.options = {"application": "audio", "frame_duration": "60"}
        frame = av.AudioFrame.from_ndarray(audio_S[None].astype(np.float32), format="flt", layout="mono")
        frame.sample_rate = self.sample_rate
        packets = [*encoder.encode(frame), *encoder.encode(None)]
        assert encoder.extradata is not None
        return packets, encoder.extradata


def _decode(packets: list[av.Packet], header: bytes) -> Audio:
    """Mono audio (samples,) at 48 kHz in [-1, 1), without the delay that the header states."""
    import av

    decoder = av.CodecContext.create("libopus", "r")
    decoder.extradata = header
    frames = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    return (np.concatenate([frame.to_ndarray()[0] for frame in frames]) / 2**15).astype(np.float32)
