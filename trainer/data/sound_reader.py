"""Reads a sound file from its first sample to its true end, in blocks, whatever length its header promises.

libsndfile reads uncompressed sound, which it does several times as fast as FFmpeg (through PyAV), and Ogg, one of the
joined streams after the other. FFmpeg reads the rest: it goes to the end of the file, where libsndfile stops at an
estimated length. What either of them skipped or guessed is in `SoundReader.notes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypeVar, cast

import numpy as np
import soundfile

from models.loudness import LARGEST_VALUE
from models.regular_file import Bytes, WatchedFile
from trainer.data import sound_headers
from trainer.data.sound_decoders import (
    LARGEST_LENGTH,
    Damaged,
    Decoder,
    Ffmpeg,
    Libsndfile,
    Ogg,
    Samples,
    Undecodable,
    WrongWave,
    divisor_of,
)
from trainer.data.sound_headers import SoundHeader

LOWEST_RATE, HIGHEST_RATE = 100, 10_000_000
"""Hz. A few kilobytes at 1 Hz would become hours."""
_BLOCK = 1 << 16
_BYTES_PER_SECOND = 100_000
"""What a second takes in a file without a length: stereo in FLAC."""

Result = TypeVar("Result")


class SoundReader:
    """An open sound file.

    Args:
        path: the file.
        file: its bytes, which are closed with the reader, if they lie elsewhere; `path` is then its name in errors.

    Attributes:
        rate: the sample rate in Hz.
        channels: the number of channels.
        notes: what was skipped or guessed; complete once `blocks` has ended.

    Raises:
        ValueError: the file is missing, is no file, can't be read as sound, or is shorter than its header promises.
        OSError: the disk failed, or refuses access that the file's permissions grant.
    """

    def __init__(self, path: Path, file: Bytes | None = None) -> None:
        self.path = path
        self._file = WatchedFile(path) if file is None else file
        try:
            self._header = self._checked(lambda: sound_headers.read(self._file.buffer, self._file.size))
            self.notes = [self._header.note] if self._header.note else []
            if not self._file.size:
                raise ValueError(f"{path} can't be read as sound: the file is empty")
            if self._header.truncated:
                raise ValueError(f"{path} is truncated: its end is missing")
            self._decoder = self._open()
        except BaseException:
            self._file.close()
            raise
        self.rate, self.channels = self._decoder.rate, self._decoder.channels
        if not LOWEST_RATE <= self.rate <= HIGHEST_RATE:
            self.close()
            raise ValueError(
                f"{path} has a sample rate of {self.rate:,} Hz, and is no sound: {LOWEST_RATE} Hz to "
                f"{HIGHEST_RATE // 10**6} MHz can be read"
            )

    def blocks(self) -> Iterator[Samples]:
        """Yield all samples in blocks of at most 65,536; to be called once.

        Raises:
            ValueError: the sound is damaged, truncated or empty, or has values that are not finite or out of all range.
            OSError: the disk failed.
        """
        seen, largest = 0, 0.0
        blocks = self._decoder.blocks(self.notes)
        while (block := self._checked(lambda: next(blocks, None))) is not None:
            for start in range(0, len(block), _BLOCK):
                part = block[start : start + _BLOCK]
                largest = max(largest, float(np.abs(part).max()))
                if not np.isfinite(part).all():
                    raise ValueError(f"{self.path} has values that are not finite")
                seen += len(part)
                yield part
        if not seen and not self._decoder.least():
            raise ValueError(f"{self.path} has no samples")
        if largest > LARGEST_VALUE:
            raise ValueError(
                f"{self.path} has values up to {largest:.6g}, but the full scale of floating-point sound is 1: divide "
                f"the values by {divisor_of(largest)} if they were whole numbers"
            )
        if seen < self._decoder.least():
            raise ValueError(f"{self.path} is truncated or damaged: only {seen / self.rate:.2f} s of it can be read")

    def estimate(self) -> float:
        """Return about how many seconds of sound the file has."""
        return self._decoder.seconds() or self._file.size / _BYTES_PER_SECOND

    def close(self) -> None:
        """Close the file."""
        self._decoder.close()
        self._file.close()

    def __enter__(self) -> Self:
        """Return the reader, which is closed at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Decoder:
        """Open the file with the decoder that reads all of it."""
        header, reason = self._header, ""
        for decoder in _decoders(header):
            try:
                self._file.buffer.seek(0)
                return self._checked(lambda: decoder(cast(BinaryIO, self._file.buffer), header))  # noqa: B023
            except Undecodable as error:
                reason = reason or str(error)
        raise ValueError(f"{self.path} can't be read as sound: {reason}")

    def _checked(self, work: Callable[[], Result]) -> Result:
        """Do a part of the work. A disk I/O error is raised as such, and the decoder's with the file's name."""
        try:
            result = work()
        except Damaged as error:
            self._file.require_sound_disk()
            raise ValueError(f"{self.path} {error}") from error
        except (MemoryError, RuntimeError) as error:
            self._file.require_sound_disk()
            reason = str(error) or "it asks for more memory than there is"
            raise ValueError(f"{self.path} can't be decoded: {reason}") from error
        except Exception:
            self._file.require_sound_disk()
            raise
        self._file.require_sound_disk()
        return result


def _decoders(header: SoundHeader) -> tuple[Callable[[BinaryIO, SoundHeader], Decoder], ...]:
    """Return the decoders that read all of such a file, the best one first."""
    if header.pcm:
        return (WrongWave,)
    if header.links:
        return Ogg, Ffmpeg
    return (Ffmpeg,) if header.compressed else (Libsndfile, Ffmpeg)


def duration(path: Path, opened: Callable[[], Bytes] | None = None) -> float:
    """Return about how many seconds of sound a file has, by its header; 0 if it can't be read as sound.

    Args:
        path: the file.
        opened: opens its bytes, if they lie elsewhere.

    Raises:
        OSError: the disk failed, or refuses access that the file's permissions grant.
    """
    try:
        with closing(opened() if opened else WatchedFile(path)) as file:
            promised = _promised(file)
        if promised:
            return promised
        with SoundReader(path, opened()) if opened else SoundReader(path) as reader:
            return reader.estimate()
    except ValueError:
        return 0.0


def _promised(file: Bytes) -> float:
    try:
        found = soundfile.info(file.buffer)
    except (soundfile.LibsndfileError, ZeroDivisionError):
        return 0.0
    finally:
        file.require_sound_disk()
    return found.duration if found.frames < LARGEST_LENGTH else 0.0
