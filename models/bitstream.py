"""The ``.spr`` file: a header as small as is sensible, codes packed to the bit, a checksum over both.

    magic      3 bytes   "SPR"
    version    1 byte
    model      4 bytes   the beginning of the codec's hash
    samples    1–5 bytes length of a channel, 7 bits a byte, lowest first, the top bit set on all but the last
    books      1 byte    codes for each vector
    layout     1 byte    channels - 1 in the upper 3 bits, log2 of the codebook's size in the lower 5
    gain       1 byte    signed, in steps of 0.5 dB
    payload              codes (channels, frames, books), most significant bit first; zeros fill the last byte
    checksum   4 bytes   CRC-32 of everything before it, big-endian

For 5 s at 48 kHz all but the payload is 18 bytes. How many frames there are follows from ``samples`` and the model.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC = b"SPR"
VERSION = 1
GAIN_STEP_DB = 0.5
GAIN_RANGE_DB = (-128 * GAIN_STEP_DB, 127 * GAIN_STEP_DB)
MAX_SAMPLES = 2**35 - 1
MAX_CHANNELS = 8
MAX_BOOKS = 255
MAX_CODE_BITS = 31

_MODEL_BYTES = 4
_CHECKSUM_BYTES = 4

Codes = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Stream:
    """What an ``.spr`` file holds."""

    model: str
    """Hash of the codec in hex: 8 digits when read; the first 8 are written."""
    samples: int
    """Length in samples a channel, at the codec's sample rate."""
    channels: int
    books: int
    """Codes for each vector."""
    size: int
    """Codewords of a book, a power of two."""
    gain_db: float
    """Gain that decoding restores; kept to the nearest 0.5 dB."""
    codes: Codes
    """(channels, frames, books), each in [0, size)."""


def write(stream: Stream) -> bytes:
    """The file's bytes.

    Raises:
        ValueError: a field that the file cannot hold, or codes that contradict the other fields.
    """
    codes = np.asarray(stream.codes)
    if codes.ndim != 3 or (codes.shape[0], codes.shape[2]) != (stream.channels, stream.books):
        raise ValueError(
            f"codes of shape {codes.shape} are not (channels={stream.channels}, frames, books={stream.books})"
        )
    payload = pack(codes.reshape(-1, stream.books), stream.size)
    body = _header(stream) + payload
    return body + _checksum(body)


def read(data: bytes, *, frames_of: Callable[[int], int]) -> Stream:
    """The stream of a file's bytes.

    Args:
        data: the whole file.
        frames_of: the number of frames (vectors a channel) that the codec makes of so many samples.

    Raises:
        ValueError: a foreign, damaged or truncated file, bytes after its end, or another version of the format.
    """
    fields = _Reader(data)
    if fields.take(len(MAGIC)) != MAGIC:
        raise ValueError("not an .spr file: it does not begin as one")
    version = fields.byte()
    if version != VERSION:
        raise ValueError(f"the .spr file has version {version} of the format; this program reads version {VERSION}")
    model = fields.take(_MODEL_BYTES).hex()
    samples, books, layout, gain = fields.varint(), fields.byte(), fields.byte(), fields.byte()
    channels, code_bits = (layout >> 5) + 1, layout & 31
    if books == 0 or code_bits == 0:
        raise ValueError("the .spr file is damaged: its header tells of no codes")
    frames = frames_of(samples)
    length = _payload_bytes(channels * frames * books, code_bits)
    # before anything is allocated: a damaged header may promise any amount
    promised = fields.position + length + _CHECKSUM_BYTES
    if len(data) != promised:
        trouble = "cut short or damaged" if len(data) < promised else "damaged, or something follows its end"
        raise ValueError(f"the .spr file is {trouble}: {len(data)} bytes where its header tells of {promised}")
    payload = fields.take(length)
    if _checksum(data[: fields.position]) != fields.take(_CHECKSUM_BYTES):
        raise ValueError("the .spr file is damaged: its checksum does not match")
    codes = unpack(payload, channels * frames, books, 2**code_bits).reshape(channels, frames, books)
    gain_db = GAIN_STEP_DB * (gain - 256 if gain > 127 else gain)
    return Stream(model, samples, channels, books, 2**code_bits, gain_db, codes)


def model_of(data: bytes) -> str:
    """The first 8 hex digits of the hash of the codec that made a file; ValueError where it is none."""
    fields = _Reader(data)
    if fields.take(len(MAGIC)) != MAGIC:
        raise ValueError("not an .spr file: it does not begin as one")
    fields.byte()
    return fields.take(_MODEL_BYTES).hex()


def pack(codes: Codes, size: int) -> bytes:
    """``codes`` (frames, books) in exactly log2 ``size`` bits each, most significant first; the last byte is padded.

    Raises:
        ValueError: codes that are no integers in [0, size), or a size that is no power of two.
    """
    code_bits = _code_bits(size)
    codes = np.asarray(codes)
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes must be integers (frames, books), not {codes.dtype} {codes.shape}")
    if codes.size and (codes.min() < 0 or codes.max() >= size):
        raise ValueError(f"codes lie in [{codes.min()}, {codes.max()}], outside [0, {size})")
    shifts = np.arange(code_bits - 1, -1, -1)
    bits = (codes.astype(np.int64)[..., None] >> shifts) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def unpack(data: bytes, frames: int, books: int, size: int) -> npt.NDArray[np.int64]:
    """The codes (frames, books) that :func:`pack` put into ``data``.

    Raises:
        ValueError: data of another length than these codes take, or a size that is no power of two.
    """
    code_bits = _code_bits(size)
    expected = _payload_bytes(frames * books, code_bits)
    if len(data) != expected:
        raise ValueError(f"{frames} × {books} codes of {code_bits} bits take {expected} bytes, not {len(data)}")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=frames * books * code_bits)
    place_values = 1 << np.arange(code_bits - 1, -1, -1, dtype=np.int64)
    return bits.reshape(frames, books, code_bits) @ place_values


def _header(stream: Stream) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{8,}", stream.model):
        raise ValueError(f"model '{stream.model}' is not a hash of at least 8 hexadecimal digits")
    for name, value, low, high in (
        ("samples", stream.samples, 0, MAX_SAMPLES),
        ("channels", stream.channels, 1, MAX_CHANNELS),
        ("books", stream.books, 1, MAX_BOOKS),
        ("gain_db", stream.gain_db, *GAIN_RANGE_DB),
    ):
        if not low <= value <= high:
            raise ValueError(f"an .spr file holds {name} from {low} to {high}, not {value}")
    layout = (stream.channels - 1) << 5 | _code_bits(stream.size)
    gain = round(stream.gain_db / GAIN_STEP_DB) & 255
    model = bytes.fromhex(stream.model[: 2 * _MODEL_BYTES])
    return MAGIC + bytes([VERSION]) + model + _varint(stream.samples) + bytes([stream.books, layout, gain])


def _varint(number: int) -> bytes:
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


class _Reader:
    """Takes fields off the front of a file, and says so where it ends too early."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def take(self, count: int) -> bytes:
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise ValueError(f"the .spr file is cut short: {len(self.data)} bytes do not even hold its header")
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
        raise ValueError("the .spr file is damaged: its length is beyond all bounds")


def _code_bits(size: int) -> int:
    if size < 2 or size & (size - 1) or size > 2**MAX_CODE_BITS:
        raise ValueError(f"codebook size {size} is not a power of two from 2 to 2^{MAX_CODE_BITS}")
    return size.bit_length() - 1


def _payload_bytes(codes: int, code_bits: int) -> int:
    return -(-codes * code_bits // 8)


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "big")
