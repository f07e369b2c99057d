"""The decoders of `trainer.data.sound_reader`, behind one interface."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from hashlib import md5
from typing import Any, BinaryIO, Protocol, cast

import av
import numpy as np
import soundfile
from av.container import InputContainer
from numpy.typing import NDArray

from models.loudness import LARGEST_VALUE
from trainer.data.sound_headers import SoundHeader

Samples = NDArray[np.float32]
"""(samples, channels), with full scale 1."""
_FORMATS = "aac,aiff,asf,au,caf,flac,matroska,mov,mp3,ogg,w64,wav"
"""What FFmpeg may take a file for. Other formats, such as playlists, name files and servers, which it would open."""
_ESTIMATED = ("aac", "mp3", "wav")
"""Formats whose length FFmpeg estimates from the bit rate or the size of the file."""
_TOLERANCE, _TOLERANCE_SECONDS = 4096, 0.1
"""Samples, or seconds if these are more, by which a length may be too large: some encoders count in their own delay."""
_COMPRESSED = ("FLAC", "MP3", "MPEG", "OGG")
"""Formats that libsndfile reads, but not to the end of every file."""
LARGEST_LENGTH = 1 << 35
"""Samples; FLAC of unknown length promises more, which is 8 days at 48 kHz."""
_BLOCK = 1 << 16  # samples


class Undecodable(Exception):
    """The decoder can't open the file; the message is the reason."""


class Damaged(Exception):
    """The decoder can't go on; the message follows the file's name."""


class Decoder(Protocol):
    """Decodes one open file."""

    rate: int
    channels: int

    def blocks(self, notes: list[str]) -> Iterator[Samples]:
        """Yield the samples until the end; append to `notes` what was left out."""

    def least(self) -> int:
        """Return the least number of samples that the whole file has, as far as it says so; called at the end."""

    def seconds(self) -> float:
        """Return the length according to the header, or 0."""

    def close(self) -> None:
        """Close the decoder, not its file."""


class Libsndfile:
    """Reads uncompressed sound. Raises Undecodable for all else."""

    def __init__(self, file: BinaryIO, header: SoundHeader) -> None:
        try:
            self._sound = soundfile.SoundFile(file)
        except soundfile.LibsndfileError as error:
            raise Undecodable(error.error_string.rstrip(".")) from error
        if self._sound.format in _COMPRESSED:
            self._sound.close()
            raise Undecodable("it is neither whole nor known")
        self.rate, self.channels = self._sound.samplerate, self._sound.channels

    def blocks(self, notes: list[str]) -> Iterator[Samples]:
        """See `Decoder`."""
        factor = self._factor(notes) if self._sound.subtype in ("FLOAT", "DOUBLE") else 1
        try:
            while len(block := self._sound.read(_BLOCK, dtype="float32", always_2d=True)):
                yield block if factor == 1 else block * np.float32(factor)
        except soundfile.LibsndfileError as error:
            raise Damaged(f"is damaged: {error.error_string.rstrip('.')}") from error

    def least(self) -> int:
        """See `Decoder`."""
        return self._sound.frames

    def _factor(self, notes: list[str]) -> float:
        """Return what to multiply by: numbers in the range of integers were converted to floats without a division."""
        largest = 0.0
        while len(block := self._sound.read(_BLOCK, dtype="float32", always_2d=True)):
            largest = max(largest, float(np.abs(block).max()))
        self._sound.seek(0)
        if not LARGEST_VALUE < largest < np.inf:
            return 1
        divisor = divisor_of(largest)
        notes.append(f"has values up to {largest:.6g} in place of 1: they are divided by {divisor}")
        return 1 / divisor

    def seconds(self) -> float:
        """See `Decoder`."""
        return self._sound.frames / self.rate

    def close(self) -> None:
        """See `Decoder`."""
        self._sound.close()


class Ogg:
    """Reads joined Ogg streams with libsndfile, which takes one at a time. Raises Undecodable for all else.

    FFmpeg loses the last samples of some streams.
    """

    def __init__(self, file: BinaryIO, header: SoundHeader) -> None:
        self._file, self._links = file, header.links
        if not header.links:
            raise Undecodable("it is no stream of sound alone")
        with self._opened(header.links[0]) as sound:
            self.rate, self.channels = sound.samplerate, sound.channels
            self._first = sound.frames
        self._seen = self._promised = 0

    def blocks(self, notes: list[str]) -> Iterator[Samples]:
        """See `Decoder`."""
        for link in self._links:
            try:
                sound = self._opened(link)
            except Undecodable as error:
                raise Damaged(f"is damaged after {self._seen / self.rate:.2f} s: {error}") from error
            with sound:
                require_same(sound.samplerate, sound.channels, self, self._seen)
                self._promised += sound.frames
                while len(block := sound.read(_BLOCK, dtype="float32", always_2d=True)):
                    self._seen += len(block)
                    yield block
                if lost := re.search(r"Skipped (\d+) bytes looking for the next page|reports a hole", sound.extra_info):
                    raise Damaged(f"is damaged: {lost[0]}")

    def least(self) -> int:
        """See `Decoder`."""
        return self._promised

    def seconds(self) -> float:
        """See `Decoder`."""
        return self._first / self.rate * len(self._links)

    def close(self) -> None:
        """See `Decoder`."""

    def _opened(self, link: tuple[int, int]) -> soundfile.SoundFile:
        try:
            return soundfile.SoundFile(io.BufferedReader(_Part(self._file, *link)))
        except soundfile.LibsndfileError as error:
            raise Undecodable(error.error_string.rstrip(".")) from error


class _Part(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, begin: int, end: int) -> None:
        super().__init__()
        self._file, self._begin, self._end, self._place = file, begin, end, begin

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._place)
        content = self._file.read(min(len(target), self._end - self._place))
        target[: len(content)] = content
        self._place += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: self._begin, os.SEEK_CUR: self._place, os.SEEK_END: self._end}[whence]
        self._place = min(max(origin + offset, self._begin), self._end)
        return self._place - self._begin

    def tell(self) -> int:
        return self._place - self._begin


class WrongWave:
    """Reads the samples of a WAV file whose length is wrong. Raises Undecodable for all else."""

    def __init__(self, file: BinaryIO, header: SoundHeader) -> None:
        if header.pcm is None:
            raise Undecodable("its length is right")
        self._file, self._pcm = file, header.pcm
        self.rate, self.channels = header.pcm.rate, header.pcm.channels
        self._width = int(header.pcm.dtype[-1])

    def blocks(self, notes: list[str]) -> Iterator[Samples]:
        """See `Decoder`."""
        each = self.channels * self._width
        self._file.seek(self._pcm.offset)
        left = self._pcm.length // each
        while left:
            content = self._file.read(min(left, _BLOCK) * each)
            values = from_pcm(content[: len(content) // each * each], self._pcm.dtype).reshape(-1, self.channels)
            if not len(values):
                return
            left -= len(values)
            yield values

    def least(self) -> int:
        """See `Decoder`."""
        return 0

    def seconds(self) -> float:
        """See `Decoder`."""
        return self._pcm.length / self._width / self.channels / self.rate

    def close(self) -> None:
        """See `Decoder`."""


def divisor_of(largest: float) -> int:
    """Return the full scale of the whole numbers whose largest one is given: 16 bits, or 32 bits."""
    return 2**15 if largest < 2**20 else 2**31


def require_same(rate: int, channels: int, decoder: Decoder, seen: int) -> None:
    """Raise Damaged if the sound goes on with another rate or number of channels than it began with."""
    if (rate, channels) != (decoder.rate, decoder.channels):
        raise Damaged(
            f"changes from {decoder.rate} Hz and {decoder.channels} channel(s) to {rate} Hz and {channels} channel(s) "
            f"after {seen / decoder.rate:.2f} s: split it there"
        )


def from_pcm(content: bytes, dtype: str) -> NDArray[np.float32]:
    """Return stored numbers as floats with full scale 1; 24 bits are written `<i3` or `>i3`."""
    if dtype[1:] == "i3":
        octets = np.frombuffer(content, np.uint8).reshape(-1, 3)
        wide = np.zeros((len(octets), 4), np.uint8)
        wide[:, slice(1, 4) if dtype[0] == "<" else slice(0, 3)] = octets
        values: NDArray[Any] = wide.view(dtype[0] + "i4")[:, 0]
    else:
        values = np.frombuffer(content, dtype)
    return to_float(values)


def to_float(values: NDArray[Any]) -> NDArray[np.float32]:
    """Scale whole numbers to full scale 1; unsigned ones have their zero in the middle."""
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    if values.dtype.kind == "u":
        return (values.astype(np.float32) - np.float32(128)) / np.float32(128)
    return values.astype(np.float32) * np.float32(0.5 ** (8 * values.itemsize - 1))


class Ffmpeg:
    """Reads any sound to its end. Raises Undecodable if there is none."""

    def __init__(self, file: BinaryIO, header: SoundHeader) -> None:
        options = {"format_whitelist": _FORMATS}
        try:
            self._container = cast(InputContainer, av.open(file, metadata_errors="ignore", options=options))
            if not self._container.streams.audio:
                self._container.close()
                raise Undecodable("it holds no sound")
            self._stream = self._container.streams.audio[0]
            self._context = self._stream.codec_context
            if self._context is None:
                self._container.close()
                raise Undecodable("its codec is not known")
        except av.error.FFmpegError as error:
            raise Undecodable(f"{error.strerror or error}".lower()) from error
        self._context.thread_count = 1
        self._header = header
        self.rate, self.channels = self._context.sample_rate, self._context.channels
        if not (self.rate > 0 and self.channels > 0):
            raise Undecodable("its header says no sample rate or no channels")
        self._seen = 0
        self._checksum = md5(usedforsecurity=False)
        self._digests: list[bytes] = []
        self._verified = False

    def blocks(self, notes: list[str]) -> Iterator[Samples]:
        """See `Decoder`."""
        if len(self._container.streams.audio) > 1:
            notes.append(f"has {len(self._container.streams.audio)} tracks of sound: the first one is used")
        packets = undecodable = 0
        held: list[Samples] = []
        for frames in self._decoded():
            packets += 1
            if frames is None:
                undecodable += 1
                continue
            held += [self._samples(frame) for frame in frames]
            if sum(map(len, held)) >= _BLOCK:
                yield np.concatenate(held)
                held = []
        if held:
            yield np.concatenate(held)
        if undecodable:
            notes.append(f"is damaged: {undecodable} of its {packets} packets can't be decoded and are left out")
        self._verify(notes)

    def least(self) -> int:
        """See `Decoder`."""
        if self._verified:
            return 0
        wanted = self._header.samples or 0
        if self._header.md5:
            return wanted
        if not wanted and self._container.format.name not in _ESTIMATED:
            wanted = round((self._container.duration or 0) / av.time_base * self.rate)
        return max(0, wanted - max(_TOLERANCE, round(_TOLERANCE_SECONDS * self.rate)))

    def seconds(self) -> float:
        """See `Decoder`."""
        return (self._container.duration or 0) / av.time_base if (self._header.samples or 0) < LARGEST_LENGTH else 0.0

    def close(self) -> None:
        """See `Decoder`."""
        self._container.close()

    def _decoded(self) -> Iterator[list[av.AudioFrame] | None]:
        """Yield the frames of each packet; None for a packet that can't be decoded."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as error:
                raise Damaged(f"is damaged: {error.strerror or error}".lower()) from error
            if packet is None:
                return
            try:
                yield list(packet.decode())
            except av.error.FFmpegError:
                yield None

    def _samples(self, frame: av.AudioFrame) -> Samples:
        require_same(frame.rate, frame.layout.nb_channels, self, self._seen)
        values = frame.to_ndarray()
        values = values.T if frame.format.is_planar else values.reshape(-1, self.channels)
        self._hash(values)
        self._seen += len(values)
        return to_float(values)

    def _hash(self, values: NDArray[Any]) -> None:
        """Add samples to the checksum that FLAC has of them; they are hashed in the width that the header says."""
        if not self._header.md5 or values.dtype.kind != "i":
            return
        left = (self._header.samples or 0) - self._seen
        for part in (values[:left], values[left:]) if 0 < left < len(values) else (values,):
            whole = (part >> (8 * values.itemsize - self._header.bits)).astype("<i4")
            octets = np.ascontiguousarray(whole).view(np.uint8).reshape(-1, 4)[:, : -(-self._header.bits // 8)]
            self._checksum.update(octets.tobytes())
            if len(part) == left:
                self._digests.append(self._checksum.digest())

    def _verify(self, notes: list[str]) -> None:
        """Compare the checksum of FLAC, of as many samples as are promised and of all: the promise may be wrong."""
        if not self._header.md5:
            return
        self._verified = self._header.md5 in (*self._digests, self._checksum.digest())
        wanted = self._header.samples or self._seen
        if not self._verified and self._seen >= wanted:
            raise Damaged("is damaged: its samples do not have the checksum in its header")
        if self._verified and self._seen != wanted:
            notes.append(f"promises {wanted} samples, but has {self._seen}: all of them are used")
