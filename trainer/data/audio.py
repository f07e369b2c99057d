"""Reads and writes sound files."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from models.atomic_write import replacing

Audio = NDArray[np.float32]
"""Audio as float32, (channels, samples) or (samples,), with full scale 1."""
_FORMATS = {".wav": ("WAV", "PCM_24"), ".flac": ("FLAC", "PCM_24"), ".ogg": ("OGG", "VORBIS")}
_MAX_VORBIS_RATE = 192_000  # Hz; libvorbis refuses more, which crashes libsndfile
_WRITE_BLOCK = 1 << 16  # samples; libsndfile overflows its stack if it encodes minutes of audio to Vorbis in one call
_LARGEST_PAGE = 65307  # bytes; the maximum size of an Ogg page
_UNKNOWN_LENGTH = 0x7FFF0000  # programs that write WAV to a pipe declare a length of this or more


def duration(path: Path) -> float:
    """Return the seconds of sound in a file according to its header, or 0 if the header can't be read."""
    try:
        return soundfile.info(os.fsencode(path)).duration
    except (soundfile.LibsndfileError, ZeroDivisionError):
        return 0.0


def read_audio(path: Path, *, sample_rate: int, channels: int = 1) -> Audio:
    """Read a sound file of any sample rate, bit depth and number of channels.

    Returns:
        float32 (channels, samples) at `sample_rate`. If the file has another number of channels, each channel is the
        mean of the file's channels.

    Raises:
        ValueError: the file can't be read, is truncated, or has no samples or values that are not finite.
    """
    audio, rate = _read(path)
    if audio.shape[1] != channels:
        audio = audio @ np.full((audio.shape[1], channels), 1 / audio.shape[1], np.float32)
    if rate != sample_rate:
        audio = soxr.resample(audio, rate, sample_rate)
    if not len(audio):
        raise ValueError(f"{path} has no samples at {sample_rate} Hz")
    return np.ascontiguousarray(audio.T)


def read_sound(path: Path) -> tuple[Audio, int]:
    """Read a sound file at its own sample rate and number of channels.

    Returns:
        float32 (channels, samples), and the sample rate in Hz.

    Raises:
        ValueError: see `read_audio`.
    """
    audio, rate = _read(path)
    if not len(audio):
        raise ValueError(f"{path} has no samples")
    return audio.T, rate


def _read(path: Path) -> tuple[Audio, int]:
    """Return the samples (samples, channels), and the sample rate in Hz."""
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # of any bytes, not of UTF-8 alone
            rate, length = file.samplerate, file.frames
            audio = file.read(dtype="float32", always_2d=True)
            container, log = file.format, file.extra_info
    except (soundfile.LibsndfileError, OSError) as error:
        reason = "the file is empty" if path.is_file() and not path.stat().st_size else _reason(error)
        raise ValueError(f"{path} can't be read as sound: {reason}") from error
    if len(audio) < length or _chunk_is_cut(log) or (container == "OGG" and _last_page_is_missing(path)):
        raise ValueError(f"{path} is truncated: its end is missing")
    if not np.isfinite(audio).all():
        raise ValueError(f"{path} has values that are not finite")
    return audio, rate


def resample(audio: Audio, rate: int, wanted: int, *, samples: int) -> Audio:
    """Resample audio (channels, any length) from `rate` to `wanted` Hz, and cut or zero-pad it to `samples`."""
    if rate != wanted:
        audio = soxr.resample(audio.T, rate, wanted).T
    missing = samples - audio.shape[1]
    return np.pad(audio, ((0, 0), (0, missing))) if missing > 0 else audio[:, :samples]


def resampled(blocks: Iterable[Audio], rate: int, wanted: int, *, channels: int, samples: int) -> Iterator[Audio]:
    """Do what `resample` does for a stream of blocks (channels, any length); the blocks together have `samples`."""
    stream = None if rate == wanted else soxr.ResampleStream(rate, wanted, channels, dtype="float32")
    left = samples
    for block in blocks:
        part = block if stream is None else stream.resample_chunk(np.ascontiguousarray(block.T)).T
        yield part[:, :left]
        left -= min(left, part.shape[1])
    if stream is not None:
        part = stream.resample_chunk(np.zeros((0, channels), np.float32), last=True).T
        yield part[:, :left]
        left -= min(left, part.shape[1])
    yield np.zeros((channels, left), np.float32)


def _reason(error: Exception) -> str:
    return error.error_string.rstrip(".") if isinstance(error, soundfile.LibsndfileError) else str(error)


def _chunk_is_cut(log: str) -> bool:
    """Whether a WAV or AIFF header declares more data than the file has, which libsndfile only logs."""
    declared = re.search(r"^ *(?:data|SSND) *: (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    return declared is not None and int(declared[2]) < int(declared[1]) < _UNKNOWN_LENGTH


def _last_page_is_missing(path: Path) -> bool:
    """Whether an Ogg file's last page is incomplete or lacks the end-of-stream flag (RFC 3533, section 6)."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2 * _LARGEST_PAGE))
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return not page[5] & 4 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def write_audio(path: Path, audio: Audio, sample_rate: int) -> None:
    """Write audio (channels, samples), clipped to [-1, 1], as the suffix says: .wav or .flac (24 bits), or .ogg.

    The file is replaced atomically. Ogg files are encoded with Vorbis.

    Raises:
        ValueError: the suffix is unknown, or the audio has values that are not finite.
    """
    if not can_write(path):
        raise ValueError(f"{path}: sound can be written as {', '.join(_FORMATS)}, not as {path.suffix!r}")
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(encode_audio(audio, sample_rate, suffix=path.suffix.lower()))


def write_blocks(path: Path, blocks: Iterable[Audio], sample_rate: int, channels: int) -> None:
    """Do what `write_audio` does for a stream of blocks (channels, any length).

    Raises:
        ValueError: see `write_audio`; also if the format does not support the sample rate.
    """
    if not can_write(path):
        raise ValueError(f"{path}: sound can be written as {', '.join(_FORMATS)}, not as {path.suffix!r}")
    if path.suffix.lower() == ".ogg" and sample_rate > _MAX_VORBIS_RATE:
        raise ValueError(
            f"{path} can't be written at {sample_rate} Hz: .ogg allows at most {_MAX_VORBIS_RATE} Hz; give a lower rate"
        )
    container, subtype = _FORMATS[path.suffix.lower()]
    try:
        with (
            replacing(path) as partial,
            soundfile.SoundFile(os.fsencode(partial), "w", sample_rate, channels, subtype, format=container) as file,
        ):
            for block in blocks:
                _write(file, block)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} can't be written at {sample_rate} Hz: {_reason(error)}") from error


def can_write(path: Path) -> bool:
    """Whether the suffix is a format that `write_audio` writes."""
    return path.suffix.lower() in _FORMATS


def sound_length(path: Path) -> tuple[int, int] | None:
    """Return samples and sample rate (Hz) of a sound file according to its header, or None if it can't be read."""
    try:
        found = soundfile.info(os.fsencode(path))
    except (soundfile.LibsndfileError, ZeroDivisionError):
        return None
    return found.frames, found.samplerate


def _write(file: soundfile.SoundFile, audio: Audio) -> None:
    if not np.isfinite(audio).all():
        raise ValueError("the audio has values that are not finite, which can't be written")
    for start in range(0, audio.shape[1], _WRITE_BLOCK):
        file.write(audio[:, start : start + _WRITE_BLOCK].T.clip(-1, 1))


def encode_audio(audio: Audio, sample_rate: int, *, suffix: str) -> bytes:
    """Return the bytes of the file that `write_audio` would write."""
    container, subtype = _FORMATS[suffix]
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", sample_rate, len(audio), subtype, format=container) as file:
        _write(file, audio)
    return content.getvalue()
