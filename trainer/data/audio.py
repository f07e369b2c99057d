"""Reads and writes sound files."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

from models.atomic_write import replacing
from models.resampling import Audio, resample
from trainer.data.sound_reader import SoundReader

_FORMATS = {".wav": ("WAV", "PCM_24"), ".flac": ("FLAC", "PCM_24"), ".ogg": ("OGG", "VORBIS")}
_MAX_VORBIS_RATE = 192_000  # Hz; libvorbis refuses more, which crashes libsndfile
_WRITE_BLOCK = 1 << 16  # samples; libsndfile overflows its stack if it encodes minutes of audio to Vorbis in one call


def read_audio(path: Path, *, sample_rate: int, channels: int = 1) -> Audio:
    """Read a sound file of any sample rate, bit depth and number of channels.

    Returns:
        float32 (channels, samples) at `sample_rate`. If the file has another number of channels, each channel is the
        mean of the file's channels.

    Raises:
        ValueError, OSError: see `SoundReader`; also if there are no samples at this rate.
    """
    with SoundReader(path) as reader:
        blocks = mixed((block.T for block in reader.blocks()), channels=channels)
        audio = np.concatenate(list(resample(blocks, reader.rate, sample_rate, channels=channels)), axis=1)
    if not audio.size:
        raise ValueError(f"{path} has no samples at {sample_rate} Hz")
    return np.ascontiguousarray(audio)


def mixed(blocks: Iterable[Audio], *, channels: int) -> Iterator[Audio]:
    """Yield blocks (any number of channels, any length) with `channels`, each of which is the mean of the others."""
    for block in blocks:
        own = len(block)
        yield block if own == channels else (block.T @ np.full((own, channels), 1 / own, np.float32)).T


def _reason(error: Exception) -> str:
    return error.error_string.rstrip(".") if isinstance(error, soundfile.LibsndfileError) else str(error)


def write_audio(path: Path, audio: Audio, sample_rate: int, *, mark: str = "") -> None:
    """Write audio (channels, samples), clipped to [-1, 1], as the suffix says: .wav or .flac (24 bits), or .ogg.

    The file is replaced atomically. Ogg files are encoded with Vorbis. A `mark` is stored as the name of the software
    that wrote the file (`ISFT` in WAV, `SOFTWARE` in FLAC and Ogg); `sound_mark` reads it.

    Raises:
        ValueError: the suffix is unknown, or the audio has values that are not finite.
    """
    if not can_write(path):
        raise ValueError(f"{path}: sound can be written as {', '.join(_FORMATS)}, not as {path.suffix!r}")
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(encode_audio(audio, sample_rate, suffix=path.suffix.lower(), mark=mark))


def write_blocks(path: Path, blocks: Iterable[Audio], sample_rate: int, channels: int, *, mark: str = "") -> None:
    """Do what `write_audio` does for a stream of blocks (channels, any length).

    Raises:
        ValueError: see `write_audio`; also if the format does not support the sample rate.
        OSError: the disk is full or fails.
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
            _written_by_libsndfile(partial, path) as output,
            soundfile.SoundFile(output, "w", sample_rate, channels, subtype, format=container) as file,
        ):
            _set_mark(file, mark)
            for block in blocks:
                _write(file, block)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} can't be written at {sample_rate} Hz: {_reason(error)}") from error


class _Output:
    """A file that libsndfile writes to. It keeps the OSErrors, which libsndfile reports vaguely or not at all."""

    def __init__(self, file: io.FileIO) -> None:
        self.file, self.failures = file, list[OSError]()
        self.seek, self.tell = file.seek, file.tell

    def write(self, data: bytes) -> int:
        """Write all bytes and return their number, which is smaller after an error."""
        done = 0
        try:
            while done < len(data):
                done += self.file.write(data[done:])
        except OSError as error:
            self.failures.append(error)
        return done


@contextmanager
def _written_by_libsndfile(partial: Path, path: Path) -> Iterator[_Output]:
    """Open `partial` for libsndfile; raise the OSError of `path` if a write to it fails."""
    with partial.open("wb", buffering=0) as file:
        output = _Output(file)
        try:
            yield output
        except (soundfile.LibsndfileError, AssertionError):  # soundfile asserts that all samples were written
            if not output.failures:
                raise
        if output.failures:
            raise OSError(output.failures[0].errno, output.failures[0].strerror, str(path))


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


def sound_mark(path: Path) -> str:
    """Return the `mark` with which `write_audio` or `write_blocks` wrote a file; another program's name; or ""."""
    try:
        with soundfile.SoundFile(path) as file:
            return re.sub(r" \(libsndfile-[^)]*\)$", "", file.software)
    except (soundfile.LibsndfileError, ZeroDivisionError):
        return ""


def _set_mark(file: soundfile.SoundFile, mark: str) -> None:
    if mark:
        file.software = mark  # libsndfile appends its own name and version


def _write(file: soundfile.SoundFile, audio: Audio) -> None:
    if not np.isfinite(audio).all():
        raise ValueError("the audio has values that are not finite, which can't be written")
    for start in range(0, audio.shape[1], _WRITE_BLOCK):
        file.write(audio[:, start : start + _WRITE_BLOCK].T.clip(-1, 1))


def encode_audio(audio: Audio, sample_rate: int, *, suffix: str, mark: str = "") -> bytes:
    """Return the bytes of the file that `write_audio` would write."""
    container, subtype = _FORMATS[suffix]
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", sample_rate, len(audio), subtype, format=container) as file:
        _set_mark(file, mark)
        _write(file, audio)
    return content.getvalue()
