"""The ``.spr`` file: a header as small as is sensible, codes packed to the bit or entropy-coded, a checksum over both.

    magic      3 bytes   "SPR"
    version    1 byte    2
    model      4 bytes   the beginning of the codec's hash
    samples    1–5 bytes length of a channel at the file's rate, 7 bits a byte, lowest first, the top bit set on all but
                         the last
    books      1 byte    codes for each vector
    sizes      1 byte    channels - 1 in the upper 3 bits, log2 of the codebook's size in the lower 5
    flags      1 byte    bit 0: entropy-coded; bits 1 and 2: how channels became rows of codes (`LAYOUTS`); bit 3: zero;
                         bits 4 to 7: the sample rate's place in `RATES`, or 15
    rate       1–3 bytes where that is 15: samples a second, as `samples` is written
    gain       1 byte    a row of codes: signed, in steps of 0.5 dB
    prior      2 bytes   where entropy-coded: the beginning of the prior's hash
    payload              codes (rows, frames, books): packed, most significant bit first, zeros filling the last byte;
                         or as the prior's coder gives them
    checksum   4 bytes   CRC-32 of everything before it, big-endian

For 5 s at 48 kHz, one channel, all but the payload is 19 bytes. How many frames there are follows from ``samples``, the
rate and the model. An entropy-coded payload is at least a `MOST_COMPRESSION`-th of the packed one, filled up with zeros
where it would be shorter: so what a file makes a reader hold is in proportion to its own length.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

MAGIC = b"SPR"
BITSTREAM_VERSION = 2
GAIN_STEP_DB = 0.5
GAIN_RANGE_DB = (-128 * GAIN_STEP_DB, 127 * GAIN_STEP_DB)
MAX_SAMPLES = 2**35 - 1
MAX_CHANNELS = 8
MAX_BOOKS = 255
MAX_CODE_BITS = 31
RATES = (
    *(8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100),
    *(48_000, 64_000, 88_200, 96_000, 176_400, 192_000, 384_000),
)
RATE_RANGE = (100, 768_000)
LAYOUTS = ("separate", "mid_side", "mid", "joint")
"""What rows of codes stand for: a channel each; (L + R) / 2 and (L - R) / 2; the former alone, of two equal channels;
or all channels together in one row."""
MOST_COMPRESSION = 16

_MODEL_BYTES = 4
_PRIOR_BYTES = 2
_CHECKSUM_BYTES = 4
_OTHER_RATE = 15

Codes = npt.NDArray[np.integer[Any]]
FramesOf = Callable[[int, int], int]


class EntropyCoder(Protocol):
    """What codes are entropy-coded by, such as :class:`models.prior.Coder`."""

    books: int
    size: int
    hash: bytes

    def encode(self, codes: npt.NDArray[np.int64]) -> bytes:
        """Bytes of codes (rows, frames, books)."""

    def decode(self, data: bytes, rows: int, frames: int, books: int) -> npt.NDArray[np.int64]:
        """The codes that `encode` made them of; ValueError where there are none such."""


@dataclass(frozen=True)
class Header:
    """What an ``.spr`` file says of itself."""

    model: str
    """Hash of the codec in hex: 8 digits when read; the first 8 are written."""
    samples: int
    """Length in samples a channel, at `rate`."""
    rate: int
    """Samples a second of the sound that was encoded, and that decoding gives back."""
    channels: int
    layout: str
    """One of `LAYOUTS`."""
    books: int
    """Codes for each vector."""
    size: int
    """Codewords of a book, a power of two."""
    gains_db: tuple[float, ...]
    """Of each row of codes the gain that decoding takes back; kept to the nearest 0.5 dB."""
    prior: str = ""
    """Hash of the prior in hex, 4 digits, where the file is entropy-coded."""

    @property
    def rows(self) -> int:
        """Rows of codes."""
        return rows_of(self.layout, self.channels)

    @property
    def seconds(self) -> float:
        """Length in time."""
        return self.samples / self.rate

    def packed_bits(self, frames: int) -> int:
        """Bits of the codes of so many frames without entropy coding: rows · frames · books · log2 size."""
        return self.rows * frames * self.books * _code_bits(self.size)


@dataclass(frozen=True, eq=False)
class Stream:
    """What an ``.spr`` file holds."""

    header: Header
    codes: Codes
    """(rows, frames, books), each in [0, size)."""


def rows_of(layout: str, channels: int) -> int:
    """Rows of codes that so many channels take."""
    return {"separate": channels, "mid_side": 2, "mid": 1, "joint": 1}[layout]


def write(stream: Stream, *, coder: EntropyCoder | None = None) -> bytes:
    """The file's bytes; entropy-coded where there is a coder and they are fewer for it.

    Raises:
        ValueError: a field that the file cannot hold, or codes that contradict the other fields.
    """
    header, codes = stream.header, np.asarray(stream.codes)
    if codes.ndim != 3 or (codes.shape[0], codes.shape[2]) != (header.rows, header.books):
        raise ValueError(f"codes of shape {codes.shape} are not (rows={header.rows}, frames, books={header.books})")
    payload, prior = pack(codes.reshape(-1, header.books), header.size), b""
    if coder is not None and coder.size == header.size:
        coded = coder.encode(codes.astype(np.int64)).ljust(-(-len(payload) // MOST_COMPRESSION), b"\0")
        if len(coded) + _PRIOR_BYTES < len(payload):
            payload, prior = coded, coder.hash[:_PRIOR_BYTES]
    body = _written(header, prior) + payload
    return body + _checksum(body)


def read(data: bytes, *, frames_of: FramesOf, coder: EntropyCoder | None = None) -> Stream:
    """The stream of a file's bytes.

    Args:
        data: the whole file.
        frames_of: the number of frames (vectors a row) that the codec makes of so many samples at such a rate.
        coder: of the codec's prior; needed where the file is entropy-coded.

    Raises:
        ValueError: a foreign, damaged or truncated file, bytes after its end, another version of the format, or one
            that is entropy-coded by another prior.
    """
    header, payload = _read(data)
    frames = frames_of(header.samples, header.rate)
    # before anything is allocated: a damaged or hostile header may promise any amount
    packed = -(-header.packed_bits(frames) // 8)
    shape = (header.rows, frames, header.books)
    if not header.prior:
        _require_length(len(payload), packed, packed)
        _require_checksum(data)
        return Stream(header, unpack(payload, header.rows * frames, header.books, header.size).reshape(shape))
    least = -(-packed // MOST_COMPRESSION)
    _require_length(len(payload), least, packed)
    _require_checksum(data)
    if coder is None or header.prior != coder.hash[:_PRIOR_BYTES].hex():
        of = "this codec has none" if coder is None else f"this codec has {coder.hash[:_PRIOR_BYTES].hex()}"
        raise ValueError(
            f"the .spr file is entropy-coded by the prior {header.prior}, {of}: give the codec that wrote it"
        )
    if coder.size != header.size:
        raise ValueError(f"the .spr file is damaged: books of {header.size}, and the prior's are of {coder.size}")
    coded = payload
    if len(payload) == least:  # filled up, perhaps
        coded = payload.rstrip(b"\0")
    return Stream(header, coder.decode(coded, *shape))


def read_header(data: bytes) -> tuple[Header, int]:
    """What a whole file says of itself, and how many bytes its payload has; raises as `read` does."""
    header, payload = _read(data)
    _require_checksum(data)
    return header, len(payload)


def model_of(data: bytes) -> str:
    """The first 8 hex digits of the hash of the codec that made a file; ValueError where it is none."""
    return _begun(data)[1]


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
    expected = -(-frames * books * code_bits // 8)
    if len(data) != expected:
        raise ValueError(f"{frames} × {books} codes of {code_bits} bits take {expected} bytes, not {len(data)}")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=frames * books * code_bits)
    place_values = 1 << np.arange(code_bits - 1, -1, -1, dtype=np.int64)
    return bits.reshape(frames, books, code_bits) @ place_values


def _written(header: Header, prior: bytes) -> bytes:
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
            raise ValueError(f"an .spr file holds {name} from {low} to {high}, not {value}")
    if len(header.gains_db) != header.rows or (header.layout in ("mid_side", "mid") and header.channels != 2):
        raise ValueError(f"{len(header.gains_db)} gains, {header.channels} channels: not what {header.layout} has")
    sizes = (header.channels - 1) << 5 | _code_bits(header.size)
    place = RATES.index(header.rate) if header.rate in RATES else _OTHER_RATE
    flags = bool(prior) | LAYOUTS.index(header.layout) << 1 | place << 4
    gains = bytes(round(gain / GAIN_STEP_DB) & 255 for gain in header.gains_db)
    model = bytes.fromhex(header.model[: 2 * _MODEL_BYTES])
    begun = MAGIC + bytes([BITSTREAM_VERSION]) + model + _varint(header.samples) + bytes([header.books, sizes, flags])
    return begun + (_varint(header.rate) if place == _OTHER_RATE else b"") + gains + prior


def _read(data: bytes) -> tuple[Header, bytes]:
    """The header, and what is between it and the checksum."""
    fields, model = _begun(data)
    samples, books, sizes, flags = fields.varint(), fields.byte(), fields.byte(), fields.byte()
    channels, code_bits, layout, place = (sizes >> 5) + 1, sizes & 31, LAYOUTS[flags >> 1 & 3], flags >> 4
    rate = fields.varint() if place == _OTHER_RATE else RATES[place]
    if books == 0 or code_bits == 0:
        raise ValueError("the .spr file is damaged: its header tells of no codes")
    if flags & 8 or (layout in ("mid_side", "mid") and channels != 2) or not RATE_RANGE[0] <= rate <= RATE_RANGE[1]:
        raise ValueError("the .spr file is damaged: its header contradicts itself")
    gains = tuple(
        GAIN_STEP_DB * (gain - 256 if gain > 127 else gain) for gain in fields.take(rows_of(layout, channels))
    )
    prior = fields.take(_PRIOR_BYTES).hex() if flags & 1 else ""
    header = Header(model, samples, rate, channels, layout, books, 2**code_bits, gains, prior)
    if len(data) < fields.position + _CHECKSUM_BYTES:
        raise ValueError(f"the .spr file is cut short: {len(data)} bytes do not even hold its header")
    return header, data[fields.position : -_CHECKSUM_BYTES]


def _begun(data: bytes) -> tuple[_Reader, str]:
    fields = _Reader(data)
    if fields.take(len(MAGIC)) != MAGIC:
        raise ValueError("not an .spr file: it does not begin as one")
    if (version := fields.byte()) != BITSTREAM_VERSION:
        raise ValueError(
            f"the .spr file has version {version} of the format; this program reads version {BITSTREAM_VERSION}"
        )
    return fields, fields.take(_MODEL_BYTES).hex()


def _require_length(found: int, least: int, most: int) -> None:
    if not least <= found <= most:
        trouble = "cut short or damaged" if found < least else "damaged, or something follows its end"
        told = f"{most}" if least == most else f"{least} to {most}"
        raise ValueError(f"the .spr file is {trouble}: {found} bytes of codes where its header tells of {told}")


def _require_checksum(data: bytes) -> None:
    if _checksum(data[:-_CHECKSUM_BYTES]) != data[-_CHECKSUM_BYTES:]:
        raise ValueError("the .spr file is damaged: its checksum does not match")


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


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "big")
