"""The ``.spr`` file: a small header, codes that are bit-packed or entropy-coded, and a checksum over both.

    magic      3 bytes   "SPR"
    version    1 byte    2, or 3 if the payload is interleaved
    model      4 bytes   the first bytes of the codec's hash
    samples    1–5 bytes samples per channel at the file's sample rate; 7 bits per byte, lowest bits first; the top bit
                         is set on all bytes but the last
    books      1 byte    codes per vector
    sizes      1 byte    channels - 1 in the upper 3 bits, log2 of the codebooks' size in the lower 5
    flags      1 byte    bit 0: entropy-coded; bits 1 and 2: index in `LAYOUTS`; bit 3: zero; bits 4 to 7: index of the
                         sample rate in `RATES`, or 15 for another sample rate
    rate       1–3 bytes only if that index is 15: samples per second, encoded like `samples`
    gain       1 byte    one byte per row of codes: signed, in steps of 0.5 dB
    prior      2 bytes   only if entropy-coded: the first bytes of the prior's hash
    payload              codes (rows, frames, books), in version 3 (frames, rows, books): packed with the most
                         significant bit first and the last byte padded with zeros, or entropy-coded
    checksum   4 bytes   CRC-32 of all bytes before it, big-endian

For one channel of 5 s at 48 kHz, everything except the payload takes 19 bytes. The number of frames is not stored: it
follows from ``samples``, the sample rate and the model. An entropy-coded payload has at least 1 / `MOST_COMPRESSION` of
the packed payload's length and is padded with zeros to it, so that a reader's memory is proportional to the file's
length.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from models.code_packing import MAX_CODE_BITS, Codes, code_bits, pack, unpack

__all__ = ["MAX_CODE_BITS", "Codes", "pack", "unpack"]

MAGIC = b"SPR"
BITSTREAM_VERSION = 2
INTERLEAVED_VERSION = 3
"""The version of files whose rows of codes are interleaved; apart from that it is version 2."""
GAIN_STEP_DB = 0.5
GAIN_RANGE_DB = (-128 * GAIN_STEP_DB, 127 * GAIN_STEP_DB)
MAX_SAMPLES = 2**35 - 1
MAX_CHANNELS = 8
MAX_BOOKS = 255
RATES = (
    *(8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100),
    *(48_000, 64_000, 88_200, 96_000, 176_400, 192_000, 384_000),
)
RATE_RANGE = (100, 768_000)
LAYOUTS = ("separate", "mid_side", "mid", "joint")
"""How rows of codes represent channels: one row per channel; (L + R) / 2 and (L - R) / 2; only (L + R) / 2, if both
channels are equal; or one row for all channels together."""
MOST_COMPRESSION = 16
CHECKSUM_BYTES = 4

_MODEL_BYTES = 4
_PRIOR_BYTES = 2
_OTHER_RATE = 15

FramesOf = Callable[[int, int], int]


class EntropyCoder(Protocol):
    """The interface of an entropy coder such as :class:`models.prior.Coder`."""

    books: int
    size: int
    hash: bytes

    def encode(self, codes: Codes, *, interleaved: bool = False) -> bytes:
        """Encode codes (rows, frames, books) to bytes, row after row or frame after frame."""

    def decode(
        self, data: bytes, rows: int, frames: int, books: int, *, interleaved: bool = False
    ) -> npt.NDArray[np.int64]:
        """Decode the codes from the bytes of `encode`; raise ValueError if `encode` can't have returned these bytes."""


@dataclass(frozen=True)
class Header:
    """The fields of an ``.spr`` file's header."""

    model: str
    """Hash of the codec in hex; a file stores its first 8 digits."""
    samples: int
    """Samples per channel at the sample rate `rate`."""
    rate: int
    """Sample rate in Hz of the sound before it was encoded and after it is decoded."""
    channels: int
    layout: str
    """One of `LAYOUTS`."""
    books: int
    """Codes per vector."""
    size: int
    """Codewords per book, a power of two."""
    gains_db: tuple[float, ...]
    """Gain of each row of codes in dB, which decoding undoes; a file stores it to the nearest 0.5 dB."""
    prior: str = ""
    """Hash of the prior as 4 hex digits if the file is entropy-coded, otherwise empty."""
    interleaved: bool = False
    """Whether the codes of all rows follow one another frame by frame, so that a sound of several rows can be decoded
    while its file is still coming. Otherwise one row follows the other."""

    @property
    def rows(self) -> int:
        """Number of rows of codes."""
        return rows_of(self.layout, self.channels)

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.samples / self.rate

    @property
    def in_order(self) -> bool:
        """Whether the codes lie in the file in the order of time."""
        return self.interleaved or self.rows == 1

    def packed_bits(self, frames: int) -> int:
        """Return the bits of `frames` frames of codes without entropy coding: rows · frames · books · log2 size."""
        return self.rows * frames * self.books * code_bits(self.size)


@dataclass(frozen=True, eq=False)
class Stream:
    """The content of an ``.spr`` file."""

    header: Header
    codes: Codes
    """(rows, frames, books), each in [0, size)."""


def rows_of(layout: str, channels: int) -> int:
    """Return how many rows of codes `channels` channels take in a layout."""
    return {"separate": channels, "mid_side": 2, "mid": 1, "joint": 1}[layout]


def write(stream: Stream, *, coder: EntropyCoder | None = None) -> bytes:
    """Return the bytes of a stream's file, entropy-coded if there is a coder and the file becomes shorter.

    Raises:
        ValueError: the format can't hold the value of a field, or the codes contradict the header.
    """
    header, codes = stream.header, np.asarray(stream.codes)
    interleaved = header.interleaved and header.rows > 1  # one row needs no file that older programs can't read
    if codes.ndim != 3 or (codes.shape[0], codes.shape[2]) != (header.rows, header.books):
        raise ValueError(f"codes of shape {codes.shape} are not (rows={header.rows}, frames, books={header.books})")
    in_file = codes.transpose(1, 0, 2) if interleaved else codes
    payload, prior = pack(in_file.reshape(-1, header.books), header.size), b""
    if coder is not None and coder.size == header.size:
        coded = coder.encode(codes, interleaved=interleaved).ljust(-(-len(payload) // MOST_COMPRESSION), b"\0")
        if len(coded) + _PRIOR_BYTES < len(payload):
            payload, prior = coded, coder.hash[:_PRIOR_BYTES]
    body = _encode_header(header, INTERLEAVED_VERSION if interleaved else BITSTREAM_VERSION, prior) + payload
    return body + _checksum(body)


def read(data: bytes, *, frames_of: FramesOf, coder: EntropyCoder | None = None) -> Stream:
    """Read a stream from the bytes of its file.

    Args:
        data: the whole file.
        frames_of: returns the codec's number of frames (vectors per row) for (samples, sample rate).
        coder: the entropy coder of the codec's prior; an entropy-coded file needs it.

    Raises:
        ValueError: the file is not an ``.spr`` file, is damaged or truncated, has bytes after its end, has another
            version of the format, or is entropy-coded with another prior.
    """
    header, payload = _parse(data)
    frames = frames_of(header.samples, header.rate)
    # Check the length before allocating memory, as a damaged or hostile header may claim any number of frames.
    least, most = payload_lengths(header, frames)
    require_length(len(payload), least, most)
    _require_checksum(data)
    shape = (header.rows, frames, header.books)
    if not header.prior:
        codes = unpack(payload, header.rows * frames, header.books, header.size)
        if header.interleaved:
            return Stream(header, codes.reshape(frames, header.rows, header.books).transpose(1, 0, 2))
        return Stream(header, codes.reshape(shape))
    coder = fitting_coder(header, coder)
    coded = payload
    if len(payload) == least:  # `write` may have padded it
        coded = payload.rstrip(b"\0")
    return Stream(header, coder.decode(coded, *shape, interleaved=header.interleaved))


def payload_lengths(header: Header, frames: int) -> tuple[int, int]:
    """Return the least and the largest number of bytes that the payload of `frames` frames may have."""
    packed = -(-header.packed_bits(frames) // 8)
    return (-(-packed // MOST_COMPRESSION) if header.prior else packed), packed


def fitting_coder(header: Header, coder: EntropyCoder | None) -> EntropyCoder:
    """Return the coder if it is that of an entropy-coded file; raise ValueError if the file needs another one."""
    if coder is None or header.prior != coder.hash[:_PRIOR_BYTES].hex():
        own = "no prior" if coder is None else f"prior {coder.hash[:_PRIOR_BYTES].hex()}"
        raise ValueError(
            f"the .spr file is entropy-coded with prior {header.prior}, but this codec has {own}: "
            "give the codec that wrote the file"
        )
    if coder.size != header.size:
        raise ValueError(
            f"the .spr file is damaged: its books have {header.size} codewords, but the prior's have {coder.size}"
        )
    return coder


def read_header(data: bytes) -> tuple[Header, int]:
    """Read the header of a whole file and its payload's length in bytes; raises the same errors as `read`."""
    header, payload = _parse(data)
    _require_checksum(data)
    return header, len(payload)


def read_beginning(data: bytes) -> tuple[Header, int] | None:
    """Read the header of a file that is still coming, and the header's length in bytes.

    None if more bytes have to come first. Raises ValueError if the file is none of this format, or damaged.
    """
    try:
        return _parse_header(data)
    except _CutShort:
        return None


def model_of(data: bytes) -> str:
    """Return the first 8 hex digits of the hash of the codec that wrote a file; raise ValueError for other files."""
    return _parse_start(data)[2]


def _encode_header(header: Header, version: int, prior: bytes) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{8,}", header.model):
        raise ValueError(f"model '{header.model}' is not a hash of at least 8 hexadecimal digits")
    for name, value, low, high in (
        ("samples", header.samples, 0, MAX_SAMPLES),
        ("rate", header.rate, *RATE_RANGE),
        ("channels", header.channels, 1, MAX_CHANNELS),
        ("books", header.books, 1, MAX_BOOKS),
        *(("gain_db", gain, *GAIN_RANGE_DB) for gain in header.gains_db),
    ):
        if not low <= value <= high:
            raise ValueError(f"an .spr file can hold {name} from {low} to {high}, not {value}")
    if len(header.gains_db) != header.rows or (header.layout in ("mid_side", "mid") and header.channels != 2):
        raise ValueError(
            f"{len(header.gains_db)} gains and {header.channels} channels do not fit the layout {header.layout}"
        )
    sizes = (header.channels - 1) << 5 | code_bits(header.size)
    place = RATES.index(header.rate) if header.rate in RATES else _OTHER_RATE
    flags = bool(prior) | LAYOUTS.index(header.layout) << 1 | place << 4
    gains = bytes(round(gain / GAIN_STEP_DB) & 255 for gain in header.gains_db)
    model = bytes.fromhex(header.model[: 2 * _MODEL_BYTES])
    start = MAGIC + bytes([version]) + model + _encode_varint(header.samples)
    rate = _encode_varint(header.rate) if place == _OTHER_RATE else b""
    return start + bytes([header.books, sizes, flags]) + rate + gains + prior


def _parse(data: bytes) -> tuple[Header, bytes]:
    """Parse the header; return it and the payload, which is the bytes between the header and the checksum."""
    header, length = _parse_header(data)
    if len(data) < length + CHECKSUM_BYTES:
        raise _CutShort(len(data))
    return header, data[length:-CHECKSUM_BYTES]


def _parse_header(data: bytes) -> tuple[Header, int]:
    """Parse the header; return it and its length."""
    reader, version, model = _parse_start(data)
    samples, books, sizes, flags = reader.varint(), reader.byte(), reader.byte(), reader.byte()
    channels, bits_each, layout, place = (sizes >> 5) + 1, sizes & 31, LAYOUTS[flags >> 1 & 3], flags >> 4
    rate = reader.varint() if place == _OTHER_RATE else RATES[place]
    if books == 0 or bits_each == 0:
        raise ValueError("the .spr file is damaged: its header claims no books or no code bits")
    if flags & 8 or (layout in ("mid_side", "mid") and channels != 2) or not RATE_RANGE[0] <= rate <= RATE_RANGE[1]:
        raise ValueError("the .spr file is damaged: its header contradicts itself")
    gains = tuple(
        GAIN_STEP_DB * (gain - 256 if gain > 127 else gain) for gain in reader.take(rows_of(layout, channels))
    )
    prior = reader.take(_PRIOR_BYTES).hex() if flags & 1 else ""
    interleaved = version == INTERLEAVED_VERSION
    header = Header(model, samples, rate, channels, layout, books, 2**bits_each, gains, prior, interleaved)
    if interleaved and header.rows == 1:
        raise ValueError("the .spr file is damaged: its header interleaves a single row")
    return header, reader.position


def _parse_start(data: bytes) -> tuple[_Reader, int, str]:
    reader = _Reader(data)
    if reader.take(len(MAGIC)) != MAGIC:
        raise ValueError("this is not an .spr file: it does not begin with SPR")
    if (version := reader.byte()) not in (BITSTREAM_VERSION, INTERLEAVED_VERSION):
        raise ValueError(
            f"the .spr file has format version {version}, but this program reads version {BITSTREAM_VERSION} and "
            f"{INTERLEAVED_VERSION}: decode the file with the release that wrote it"
        )
    return reader, version, reader.take(_MODEL_BYTES).hex()


def require_length(found: int, least: int, most: int) -> None:
    """Raise ValueError unless a payload of `found` bytes has from `least` to `most` bytes."""
    if not least <= found <= most:
        trouble = "cut short or damaged" if found < least else "damaged, or has bytes after its end"
        expected = f"{most}" if least == most else f"{least} to {most}"
        raise ValueError(f"the .spr file is {trouble}: it has {found} bytes of codes, and its header needs {expected}")


def _require_checksum(data: bytes) -> None:
    if _checksum(data[:-CHECKSUM_BYTES]) != data[-CHECKSUM_BYTES:]:
        raise ValueError("the .spr file is damaged: its checksum does not match")


def _encode_varint(number: int) -> bytes:
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


class _CutShort(ValueError):
    """The bytes end within the header."""

    def __init__(self, length: int) -> None:
        super().__init__(f"the .spr file is cut short: {length} bytes do not even hold its header")


class _Reader:
    """Reads the fields of a file one after the other; raises ValueError if the file ends too early."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise _CutShort(len(self.data))
        self.position += count
        return taken

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        number = 0
        for shift in range(0, MAX_SAMPLES.bit_length(), 7):
            group = self.byte()
            number |= (group & 127) << shift
            if group < 128:
                return number
        raise ValueError("the .spr file is damaged: a number in its header is too large")


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(CHECKSUM_BYTES, "big")
