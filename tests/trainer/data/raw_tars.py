"""Tars made block by block, so that their headers can say anything."""

from __future__ import annotations

import io

import numpy as np

BLOCK = 512
END = bytes(2 * BLOCK)
CHANNELS = 128


def latents(number: int, frames: int = 9) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((CHANNELS, frames)).astype(np.float16)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_with_header(header: str, values: bytes = b"") -> bytes:
    encoded = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(encoded).to_bytes(2, "little") + encoded + values


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def with_checksum(header: bytes) -> bytes:
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def header(name: bytes, size: int | bytes, *, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """`size` as bytes is the field itself."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    blank = b"0000644\0" + b"0000000\0" * 2 + field + b"00000000000\0" + b" " * 8 + kind
    start = name.ljust(100, b"\0") + blank + link.ljust(100, b"\0") + b"ustar\x0000"
    return with_checksum(start.ljust(BLOCK, b"\0"))


def member(name: bytes, content: bytes = b"", *, kind: bytes = b"0", link: bytes = b"") -> bytes:
    return header(name, len(content), kind=kind, link=link) + padded(content)


def pax(records: dict[str, bytes], *, kind: bytes = b"x") -> bytes:
    lines = b""
    for key, value in records.items():
        rest = b" " + key.encode() + b"=" + value + b"\n"
        length = len(rest)
        while length != len(rest) + len(str(length)):
            length = len(rest) + len(str(length))
        lines += str(length).encode() + rest
    return member(b"pax", lines, kind=kind)
