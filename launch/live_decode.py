"""`spresso decode -`: decodes a stream while it comes, from standard input or a file to standard output, as WAV."""

from __future__ import annotations

import dataclasses
import struct
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from launch.file_decoder import named_errors
from launch.find_codec import fitting_codec, load_codec
from launch.output import reader_is_gone
from models import bitstream
from models.bitstream import Header
from models.live_decoder import CutShort, LiveDecoder
from models.readable import require_file
from models.resampling import Audio, resample, resampled_samples
from trainer.file_names import printable

STANDARD = Path("-")
"""Standard input or output, as an argument."""
_READ_BYTES = 4096
"""Bytes that are read at once, at most; a pipe gives those that are there."""
_STDOUT = 1
_SAMPLE_BYTES = 2
_LARGEST_CHUNK = 2**32 - 1
"""The size in a WAV header that players take for `until the end`, for sounds whose size does not fit."""


def decode_live(
    source: Path, *, codec: Path | None, device: str, seed: int, steps: int | None, rate: int | None = None
) -> None:
    """Decode a stream, or standard input, to standard output: a WAV file of 16 bits.

    The arguments are those of `launch.codec_files.decode`; `source` may be `STANDARD`.

    Raises:
        ValueError: the codec can't be used, the stream is damaged, or another model made it. If the stream is cut
            short, what had come of it is decoded first.
    """
    if sys.stdout.isatty():
        raise ValueError(
            "sound is not written to a terminal: name a file to write, or pipe the sound into a player, as in "
            "`spresso decode - | aplay`"
        )
    name = Path("standard input") if source == STANDARD else source
    with named_errors(name):
        parts = _read(source)
        header, beginning = _read_header(parts)
        spresso = load_codec(codec or fitting_codec(header.model, name), device)
        sampling = spresso.config.sampling
        if steps is not None:
            sampling = dataclasses.replace(sampling, steps=steps)
        decoder = spresso.decoder(seed=seed, sampling=sampling)
        spresso.require_own(header)
        _tell(name, header, decoder.delay)
        _play(decoder, chain([beginning], parts), header, ours=spresso.autoencoder.sample_rate, rate=rate)


def _read(source: Path) -> Iterator[bytes]:
    """Yield the bytes of a file or of standard input as they come."""
    if source == STANDARD:
        stdin: Any = sys.stdin.buffer  # whose type does not tell of read1, which waits for no more than there is
        yield from iter(lambda: stdin.read1(_READ_BYTES), b"")
    else:
        require_file(source)
        with source.open("rb") as file:
            yield from iter(lambda: file.read(_READ_BYTES), b"")


def _read_header(parts: Iterator[bytes]) -> tuple[Header, bytes]:
    """Read until the header is there; return it and all bytes so far. Raises ValueError if it is cut short."""
    beginning = b""
    while (found := bitstream.read_beginning(beginning)) is None:
        if not (part := next(parts, b"")):
            bitstream.read_header(beginning)  # which raises the error
        beginning += part
    return found[0], beginning


def _tell(name: Path, header: Header, delay: float) -> None:
    """Say on stderr what comes, and when."""
    begins = "" if header.in_order else ", and begins with the codes of the last channel: see `spresso encode --live`"
    print(
        f"{printable(str(name))}: {header.seconds:.3f} s at {header.rate} Hz, {header.channels} channel(s); "
        f"the sound follows its codes by at most {delay:.3g} s{begins}",
        file=sys.stderr,
    )


def _play(decoder: LiveDecoder, parts: Iterator[bytes], header: Header, *, ours: int, rate: int | None) -> None:
    """Write the sound of a stream to standard output; raise CutShort after all that had come of it."""
    failures: list[CutShort] = []

    def decoded() -> Iterator[Audio]:
        for part in parts:
            yield from (block.cpu().numpy() for block in decoder.blocks(part))
        try:
            yield decoder.flush().cpu().numpy()
        except CutShort as error:
            failures.append(error)
            yield error.samples.cpu().numpy()

    wanted = rate or header.rate
    left = resampled_samples(header.samples, header.rate, wanted)
    sys.stdout.buffer.write(wav_header(wanted, header.channels, left))
    for block in resample(decoded(), ours, wanted, channels=header.channels):
        _write(block[:, :left])
        left -= min(left, block.shape[1])
        if reader_is_gone(_STDOUT):
            return
    if failures:
        raise failures[0]
    _write(np.zeros((header.channels, left), np.float32))


def _write(audio: Audio) -> None:
    """Write audio (channels, …), clipped to [-1, 1], and flush."""
    scaled = np.rint(audio.T.clip(-1, 1) * (2**15 - 1))
    sys.stdout.buffer.write(scaled.astype("<i2").tobytes())
    sys.stdout.buffer.flush()


def wav_header(rate: int, channels: int, samples: int) -> bytes:
    """Return the 44 bytes before the samples of a WAV file of 16 bits; `samples` counts those of one channel."""
    frame = channels * _SAMPLE_BYTES
    size = min(samples * frame, _LARGEST_CHUNK)
    kind = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * frame, frame, 8 * _SAMPLE_BYTES)
    riff = struct.pack("<4sI4s", b"RIFF", min(size + 36, _LARGEST_CHUNK), b"WAVE")
    return riff + kind + struct.pack("<4sI", b"data", size)
