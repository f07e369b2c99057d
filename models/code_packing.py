"""Codes as bits: packed without gaps, most significant bit first."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MAX_CODE_BITS = 31
_FRAMES_AT_ONCE = 1 << 12  # a multiple of 8, so that the codes of so many frames fill whole bytes

Codes = npt.NDArray[np.integer[Any]]


def pack(codes: Codes, size: int) -> bytes:
    """Pack ``codes`` (frames, books) into log2 ``size`` bits each, most significant bit first, and pad the last byte.

    Raises:
        ValueError: the codes are not integers in [0, size), or ``size`` is not a power of two.
    """
    bits_each = code_bits(size)
    codes = np.asarray(codes)
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes must be integers (frames, books), not {codes.dtype} {codes.shape}")
    if codes.size and (codes.min() < 0 or codes.max() >= size):
        raise ValueError(f"codes lie in [{codes.min()}, {codes.max()}], outside [0, {size})")
    shifts = np.arange(bits_each - 1, -1, -1)
    packed = []
    for first in range(0, len(codes), _FRAMES_AT_ONCE):
        bits = (codes[first : first + _FRAMES_AT_ONCE].astype(np.int64)[..., None] >> shifts) & 1
        packed.append(np.packbits(bits.astype(np.uint8)).tobytes())
    return b"".join(packed)


def unpack(data: bytes, frames: int, books: int, size: int) -> npt.NDArray[np.int64]:
    """Unpack the codes (frames, books) that :func:`pack` packed into ``data``.

    Raises:
        ValueError: ``data`` does not have the length of these codes, or ``size`` is not a power of two.
    """
    bits_each = code_bits(size)
    expected = -(-frames * books * bits_each // 8)
    if len(data) != expected:
        raise ValueError(f"{frames} × {books} codes of {bits_each} bits take {expected} bytes, not {len(data)}")
    place_values = 1 << np.arange(bits_each - 1, -1, -1, dtype=np.int64)
    codes = np.empty((frames, books), np.int64)
    each = books * bits_each  # bits of a frame
    for first in range(0, frames, _FRAMES_AT_ONCE):
        part = codes[first : first + _FRAMES_AT_ONCE]
        octets = np.frombuffer(data, np.uint8, -(-len(part) * each // 8), first * each // 8)
        part[:] = np.unpackbits(octets, count=len(part) * each).reshape(*part.shape, bits_each) @ place_values
    return codes


def code_bits(size: int) -> int:
    """Return log2 of a codebook's size; raise ValueError if that is no whole number from 1 to `MAX_CODE_BITS`."""
    if size < 2 or size & (size - 1) or size > 2**MAX_CODE_BITS:
        raise ValueError(f"codebook size {size} is not a power of two from 2 to 2^{MAX_CODE_BITS}")
    return size.bit_length() - 1
