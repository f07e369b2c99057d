"""Reads the codes of an ``.spr`` file while its bytes are still coming.

If one row of codes follows the other, the first rows wait in memory for the last one; a file whose header is `in_order`
gives codes from its beginning on.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from models.bitstream import (
    CHECKSUM_BYTES,
    MOST_COMPRESSION,
    Header,
    fitting_coder,
    payload_lengths,
    require_length,
)
from models.code_packing import code_bits
from models.prior import Coder, VectorDecoder

Frames = NDArray[np.int64]
"""Codes (rows, frames, books)."""


class CodeReader:
    """Turns the bytes that follow a file's header into codes.

    Args:
        header: the file's header.
        beginning: the header's bytes, which the checksum covers, too.
        frames: vectors per row, see `SPresso.z_frames`.
        coder: the entropy coder of the codec's prior; an entropy-coded file needs it.

    Raises:
        ValueError: the file is entropy-coded with another prior.
    """

    def __init__(self, header: Header, beginning: bytes, frames: int, coder: Coder | None) -> None:
        self._rows, self._frames, self._interleaved = header.rows, frames, header.interleaved
        self._least, self._most = payload_lengths(header, frames)
        self._vector_bits = header.books * code_bits(header.size)
        self._vectors: _PackedVectors | VectorDecoder = _PackedVectors(header.books, code_bits(header.size))
        if header.prior:
            fitting_coder(header, coder)
            assert coder is not None
            self._vectors = VectorDecoder(coder, header.books, rows=header.rows if header.interleaved else 1)
        self._done = 0  # vectors of all rows
        self._waiting: list[deque[list[int]]] = [deque() for _ in range(header.rows)]
        self._length, self._crc, self._last = 0, zlib.crc32(beginning), b""

    def push(self, data: bytes, *, at_once: int) -> Iterator[Frames]:
        """Go on with the next bytes; yield the codes that are now known in all rows, `at_once` frames or fewer a time.

        Raises:
            ValueError: the file is damaged, or has bytes after its end.
        """
        self._last += data
        # how long an entropy-coded payload is shows at its end, so what may be the checksum is held back
        packed = isinstance(self._vectors, _PackedVectors)
        now = self._most - self._length if packed else max(0, len(self._last) - CHECKSUM_BYTES)
        payload, self._last = self._last[:now], self._last[now:]
        self._length += len(payload)
        self._crc = zlib.crc32(payload, self._crc)
        if self._length > self._most or len(self._last) > CHECKSUM_BYTES:
            require_length(self._length + max(1, len(self._last) - CHECKSUM_BYTES), self._least, self._most)
        self._vectors.push(payload)
        yield from self._read(at_once)

    def end(self, *, at_once: int) -> Iterator[Frames]:
        """Say that no more bytes come; yield the remaining codes as `push` does.

        Raises:
            ValueError: the file is cut short or damaged; then nothing is yielded.
        """
        require_length(self._length, self._least, self._most)
        if self._crc.to_bytes(CHECKSUM_BYTES, "big") != self._last:
            raise ValueError("the .spr file is cut short or damaged: its checksum does not match")
        self._vectors.end()
        yield from self._read(at_once)

    def _read(self, at_once: int) -> Iterator[Frames]:
        while self._may_go_on() and (codes := self._vectors.next_vector()) is not None:
            row = self._done % self._rows if self._interleaved else self._done // self._frames
            self._waiting[row].append(codes)
            self._done += 1
            if not self._interleaved and self._done % self._frames == 0:
                self._vectors.begin_row()
            if len(self._waiting[-1]) == at_once:
                yield self._take()
        if self._waiting[-1]:
            yield self._take()

    def _may_go_on(self) -> bool:
        """Whether there are vectors left, and the bytes so far justify the work of one more, see `MOST_COMPRESSION`."""
        bits = (self._done + 1) * self._vector_bits
        return self._done < self._rows * self._frames and bits <= 8 * MOST_COMPRESSION * self._length + 7

    def _take(self) -> Frames:
        """Return the frames that are known in all rows, and forget them."""
        known = len(self._waiting[-1])
        return np.array([[row.popleft() for _ in range(known)] for row in self._waiting], np.int64)


class _PackedVectors:
    """Reads vectors of codes that are packed without entropy coding; has the methods of `VectorDecoder`."""

    def __init__(self, books: int, bits: int) -> None:
        self._mask = (1 << bits) - 1
        self._shifts = range((books - 1) * bits, -1, -bits)
        self._vector_bits = books * bits
        self._bytes, self._place = bytearray(), 0

    def push(self, data: bytes) -> None:
        """Append bytes of the payload."""
        self._bytes += data

    def end(self) -> None:
        """Say that the payload is complete."""

    def begin_row(self) -> None:
        """Say that the next vector is a row's first."""

    def next_vector(self) -> list[int] | None:
        """Return the next vector's codes; None if more bytes have to come first."""
        end = self._place + self._vector_bits
        octets = -(-end // 8)
        if octets > len(self._bytes):
            return None
        number = int.from_bytes(self._bytes[:octets], "big") >> (8 * octets - end)
        del self._bytes[: end // 8]
        self._place = end % 8
        return [number >> shift & self._mask for shift in self._shifts]
