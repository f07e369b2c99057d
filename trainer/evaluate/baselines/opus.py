"""Opus (RFC 6716), through ffmpeg and libopus: what everyone has."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import numpy as np
import torch

from trainer.data.audio import Audio
from trainer.evaluate.baselines.baseline import Baseline

_HEADERS = 2  # packets before the sound: OpusHead and OpusTags
_TIMEOUT = 600  # seconds


class Opus(Baseline):
    """48 kHz, in frames of 60 ms, the longest that all versions know: the least overhead."""

    name, title, licence = "opus", "Opus", "BSD (libopus); ffmpeg's own"
    rates = (6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0)
    default_kbps = 6.0
    sample_rate = 48_000

    def missing(self) -> str:
        """There is no ffmpeg, or one without libopus."""
        if shutil.which("ffmpeg") is None:
            return "there is no ffmpeg: apt-get install ffmpeg"
        listed = subprocess.run(["ffmpeg", "-hide_banner", "-encoders"], capture_output=True, text=True, check=False)
        return "" if "libopus" in listed.stdout else "this ffmpeg has no libopus: install one that was built with it"

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def run(self, audio_S: Audio) -> tuple[Audio, int | None]:
        """Encoded and decoded in memory; the decoder takes off the delay that the header tells of."""
        raw = ("-f", "f32le", "-ar", str(self.sample_rate), "-ac", "1")
        rate = ("-c:a", "libopus", "-b:a", f"{self.kbps:g}k", "-application", "audio", "-frame_duration", "60")
        encoded = _ffmpeg((*raw, "-i", "pipe:0", *rate, "-f", "ogg", "pipe:1"), audio_S.astype("<f4").tobytes())
        decoded = _ffmpeg(("-c:a", "libopus", "-f", "ogg", "-i", "pipe:0", *raw, "pipe:1"), encoded)
        payload = list(ogg_packets(encoded))[_HEADERS:]
        return np.frombuffer(decoded, "<f4").astype(np.float32), 8 * sum(payload)


def ogg_packets(data: bytes) -> Iterator[int]:
    """Bytes of each packet of an Ogg file of one stream (RFC 3533, section 6): a packet ends with a lace below 255.

    Raises:
        ValueError: it is none.
    """
    position = packet = 0
    while position < len(data):
        if data[position : position + 4] != b"OggS" or position + 27 > len(data):
            raise ValueError(f"no Ogg page at byte {position}")
        laces = data[position + 27 : position + 27 + data[position + 26]]
        position += 27 + len(laces) + sum(laces)
        for lace in laces:
            packet += lace
            if lace < 255:
                yield packet
                packet = 0


def _ffmpeg(arguments: tuple[str, ...], content: bytes) -> bytes:
    command = ["ffmpeg", "-hide_banner", "-loglevel", "error", "-nostdin", *arguments]
    result = subprocess.run(command, input=content, capture_output=True, check=False, timeout=_TIMEOUT)
    if result.returncode:
        raise ValueError(f"ffmpeg failed: {' '.join(result.stderr.decode(errors='replace').split())[:300]}")
    return result.stdout
