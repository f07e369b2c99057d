"""Encodes single sound files into streams for `spresso encode`, and tells which streams still hold."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.encode_record import EncodeRecord, crc32_of, version_of
from models import bitstream
from models.atomic_write import write_whole
from models.bitstream import Header, Stream
from models.codec import SPresso
from models.disk_errors import patiently
from models.encoding import encode_sound, rate_search
from models.resampling import Audio
from trainer.data.audio import sound_length
from trainer.data.sound_reader import SoundReader
from trainer.file_names import printable
from trainer.files import file_digest


@dataclass
class FileEncoder:
    """Encodes sound files with fixed settings, and sums up sizes and seconds."""

    spresso: SPresso
    books: int | None
    channels: str
    entropy: bool
    record: EncodeRecord | None = None
    """What the streams of a folder were made from; None for a single file."""
    error_per_bit: float = 0.0
    """See `SPresso.encode`."""
    live: bool = False
    """Whether to interleave the rows of codes."""
    seconds: float = 0.0
    packed_bits: int = 0
    file_bytes: int = 0
    files: int = 0
    payload_bytes: int = 0

    def __post_init__(self) -> None:
        self.coder = self.spresso.coder() if self.entropy else None
        quantizer = self.spresso.fitted_quantizer()
        self.written_books = quantizer.books if self.books is None else self.books
        rate_search(self.spresso, self.written_books, self.error_per_bit)  # raises ValueError before the first file
        prior = "none" if self.coder is None else self.coder.hash.hex()[:8]
        model = self.spresso.model_hash[:16]
        self.settings = f"model={model} books={self.written_books} channels={self.channels} prior={prior}"
        if self.error_per_bit:
            self.settings += f" error_per_bit={self.error_per_bit!r}"
        if self.live:
            self.settings += " live=True"

    def __call__(self, source: Path, target: Path, progress: Callable[[float], None]) -> None:
        """Encode one file. Raises ValueError, OSError."""
        version = version_of(source)
        with SoundReader(source) as reader:
            rate = reader.rate
        notes: list[str] = []

        def blocks() -> Iterator[Audio]:
            with SoundReader(source) as reader:
                yield from (block.T for block in reader.blocks())
                notes[:] = reader.notes

        with torch.inference_mode():
            stream = encode_sound(
                self.spresso,
                blocks,
                sample_rate=rate,
                books=self.books,
                channels=self.channels,
                error_per_bit=self.error_per_bit,
                progress=progress,
            )
        digest = file_digest(source) if self.record is not None else None
        if version_of(source) != version:
            raise ValueError(f"{source} was changed while it was read: encode it again when nothing writes it")
        for note in notes:
            print(f"spresso: {printable(f'{source} {note}')}", file=sys.stderr)
        if self.live:
            stream = Stream(dataclasses.replace(stream.header, interleaved=True), stream.codes)
        content = bitstream.write(stream, coder=self.coder)
        write_whole(target, content)
        if self.record is not None:
            self.record.add(target, crc32_of(content), version, digest, self.settings)
        self._sum_up(content, frames=stream.codes.shape[1])

    def _sum_up(self, content: bytes, *, frames: int) -> None:
        header, payload = bitstream.read_header(content)
        self.files += 1
        self.seconds += header.seconds
        self.packed_bits += header.packed_bits(frames)
        self.payload_bytes += payload
        self.file_bytes += len(content)

    def made(self, source: Path, target: Path) -> bool:
        """Whether the target is whole and was made from the source as it is now, by this codec with these settings.

        The folder's record decides. Without a line in it, as for streams of older versions, a stream holds if its
        header fits codec, settings and length, and the source's content and entry are no newer than the stream.
        """
        assert self.record is not None
        try:
            content = patiently(target.read_bytes)
            header, _ = bitstream.read_header(content)
        except (FileNotFoundError, ValueError):
            return False
        if (header.model, header.books) != (self.spresso.model_hash[:8], self.written_books):
            return False
        if (recorded := self.record.checksum(target)) is not None:
            return recorded == crc32_of(content) and self.record.holds(source, target, self.settings)
        if self.error_per_bit or not self._fits(header) or sound_length(source) != (header.samples, header.rate):
            return False
        size, *times = version_of(source)
        if max(times) > target.stat().st_mtime_ns:
            return False
        self.record.add(target, crc32_of(content), [size, *times], None, self.settings)
        return True

    def _fits(self, header: Header) -> bool:
        """Whether a stream's channels and entropy coding are what the settings give."""
        separate = header.layout == "separate"
        layout_fits = separate if self.channels == "separate" else not separate or header.channels != 2
        own = "" if self.coder is None else self.coder.hash[: len(header.prior) // 2].hex()
        return layout_fits and header.in_order >= self.live and header.prior in ("", own)

    def summary(self) -> str:
        """Return the size and the bit rates of all files so far, for people."""
        plain, coded, whole = (
            bits / self.seconds / 1000 for bits in (self.packed_bits, self.payload_bytes * 8, self.file_bytes * 8)
        )
        entropy = f", entropy-coded {coded:.3f}" if self.coder is not None else ""
        return (
            f"{self.file_bytes} bytes for {self.seconds:.2f} s, {plain:.3f} kbps{entropy} ({whole:.3f} with "
            f"{'its header' if self.files == 1 else 'the headers'})"
        )
