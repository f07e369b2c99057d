"""What a sound file's header promises, and whether the file holds it.

Recorders that are cut off, pipes and files above 4 GiB leave lengths that are zero, wrapped or too large. This module
compares them with the size of the file, so that `trainer.data.sound_reader` reads what is there. Sources: RIFF and
WAVE (Microsoft, 1991), RF64 (EBU Tech 3306), AIFF (Apple, 1989), CAF (Apple, 2006), Sony Wave64, RFC 9639 (FLAC),
RFC 3533 (Ogg), and the de facto headers of VBR MP3 by Xing and Fraunhofer.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import BinaryIO

_HEAD = 1 << 16  # bytes; the headers that are looked at lie in the first ones, after an ID3v2 tag
_WRAP = 1 << 32
_UNKNOWN = 0x7FFF0000  # programs that write WAV to a pipe declare a length of this or more
_OGG_FIRST, _OGG_LAST = 2, 4  # flags of a page
_W64_RIFF = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_W64_HEADER = 40
_MOST_CHUNKS = 10_000
_TAGS = (b"TAG", b"ID3", b"APET")  # what taggers append to files of any kind
_EXTENSIBLE = 0xFFFE  # WAVE's code for a longer header, which has one of the following codes inside
_DTYPES = {(1, 1): "u1", (1, 2): "i2", (1, 3): "i3", (1, 4): "i4", (3, 4): "f4", (3, 8): "f8"}
"""NumPy's names for (WAVE's code, bytes per number)."""


@dataclass(frozen=True)
class Pcm:
    """Where the samples of a WAV file are whose length is wrong, and how they are stored."""

    rate: int
    channels: int
    dtype: str
    """Of NumPy; `i3` and its like are whole numbers of 24 bits."""
    offset: int = 0
    """The first byte."""
    length: int = 0
    """The number of bytes."""


@dataclass(frozen=True)
class SoundHeader:
    """What `read` found; the defaults are those of a file that it does not know."""

    compressed: bool = False
    """Whether the file is FLAC, Ogg or MP3, which FFmpeg reads to the end."""
    truncated: bool = False
    """Whether the file ends before what its header promises."""
    samples: int | None = None
    """The promised number of samples per channel, where only this header says it."""
    pcm: Pcm | None = None
    """The samples, if the header's own length is wrong."""
    links: tuple[tuple[int, int], ...] = ()
    """Ogg: the first byte of each of the joined streams, and the byte after its last."""
    bits: int = 0
    """FLAC: bits per sample."""
    md5: bytes = b""
    """FLAC: the checksum of all samples, or nothing."""
    note: str = ""
    """What a user should know of the length."""


def read(file: BinaryIO, size: int) -> SoundHeader:
    """Return what the header of a file of `size` bytes promises. Damaged headers are left to the decoders."""
    file.seek(0)
    head = file.read(_HEAD)
    start = _id3_length(head)
    if start:
        file.seek(start)
        head = file.read(_HEAD)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
        return _wave(file, size, ">" if head[:4] == b"RIFX" else "<")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _aiff(file, size)
    if head[:16] == _W64_RIFF and len(head) >= 24:
        return SoundHeader(truncated=size < struct.unpack("<Q", head[16:24])[0])
    if head[:4] in (b".snd", b"dns.") and len(head) >= 12:
        offset, length = struct.unpack(">II" if head[:4] == b".snd" else "<II", head[4:12])
        return SoundHeader(truncated=offset + length > size and length < _UNKNOWN)
    if head[:4] == b"caff":
        return _caf(file, size)
    if head[:4] == b"fLaC" and len(head) >= 42:
        return _flac(head)
    if head[:4] == b"OggS":
        return _ogg(file, size)
    if len(head) > 3 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06:
        return SoundHeader(compressed=True, samples=_samples_of_mp3(head))
    return SoundHeader(compressed=bool(start))


def _id3_length(head: bytes) -> int:
    """Return the bytes of an ID3v2 tag at the start; its size has 7 bits per byte."""
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    length = 0
    for byte in head[6:10]:
        length = length << 7 | byte & 127
    return 10 + length


def _chunks(file: BinaryIO, size: int, start: int, order: str) -> list[tuple[bytes, int, int]]:
    """Return (name, offset of the content, declared length) of the chunks from `start`; the last may be cut."""
    found: list[tuple[bytes, int, int]] = []
    while start + 8 <= size and len(found) < _MOST_CHUNKS:
        file.seek(start)
        name, length = struct.unpack(order + "4sI", file.read(8))
        found.append((name, start + 8, length))
        start += 8 + length + length % 2
    return found


def _wave(file: BinaryIO, size: int, order: str) -> SoundHeader:
    data_64, pcm = 0, None
    for name, offset, length in _chunks(file, size, 12, order):
        file.seek(offset)
        if name == b"ds64" and length >= 16:
            (data_64,) = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))
        elif name == b"fmt " and length >= 16:
            pcm = _pcm(file.read(26).ljust(26, b"\0"), order)
        elif name == b"data":
            if data_64 and length >= _UNKNOWN:
                return SoundHeader(truncated=offset + data_64 > size)
            return _wave_data(file, size, order, offset, length, pcm)
    return SoundHeader()


def _pcm(form: bytes, order: str) -> Pcm | None:
    """Read WAVE's description of the samples; None if they are not plain numbers."""
    kind, channels, rate, align, bits, _, _, _, inner = struct.unpack(order + "HHIxxxxHHHHIH", form)
    width = align // channels if channels and not align % channels else 0
    dtype = _DTYPES.get((inner if kind == _EXTENSIBLE else kind, width))
    if dtype is None or bits > 8 * width or not rate:
        return None
    return Pcm(rate, channels, dtype if dtype == "u1" else order + dtype)


def _wave_data(file: BinaryIO, size: int, order: str, offset: int, length: int, pcm: Pcm | None) -> SoundHeader:
    """Judge the data chunk."""
    there, end = size - offset, offset + length + length % 2
    if length > there:
        return SoundHeader(truncated=length < _UNKNOWN)
    if _ends_properly(file, size, order, end):
        return SoundHeader()
    if pcm is not None:
        # A length of 32 bits has wrapped if it is right once multiples of 4 GiB are added.
        for wraps in range((there - length) // _WRAP, 0, -1):
            if _ends_properly(file, size, order, end + wraps * _WRAP):
                whole = replace(pcm, offset=offset, length=length + wraps * _WRAP)
                return SoundHeader(pcm=whole, note="has a length that wrapped at 4 GiB: it is read to its end")
        if length == 0 or length >= _UNKNOWN:
            whole = replace(pcm, offset=offset, length=there)
            return SoundHeader(pcm=whole, note="has no length in its header: it is read to the end of the file")
    return SoundHeader(note=f"goes on after the end that its header says: the last {size - end} bytes are left out")


def _ends_properly(file: BinaryIO, size: int, order: str, end: int) -> bool:
    """Whether nothing but chunks, tags and padding follows `end`."""
    if end >= size - 1:
        return end <= size + 1
    file.seek(end)
    rest = file.read(1 << 16)
    if rest.startswith(_TAGS) or (len(rest) == size - end and not any(rest)):
        return True
    chunks = _chunks(file, size, end, order)
    names_are_text = all(all(32 <= byte < 127 for byte in name) for name, _, _ in chunks)
    return bool(chunks) and names_are_text and chunks[-1][1] + chunks[-1][2] <= size


def _aiff(file: BinaryIO, size: int) -> SoundHeader:
    for name, offset, length in _chunks(file, size, 12, ">"):
        if name == b"SSND":
            return SoundHeader(truncated=offset + length > size and length < _UNKNOWN)
    return SoundHeader()


def _caf(file: BinaryIO, size: int) -> SoundHeader:
    """Look at the data chunk; its length is -1 where the recorder could not go back."""
    start = 8
    for _ in range(_MOST_CHUNKS):
        if start + 12 > size:
            break
        file.seek(start)
        head = file.read(12)
        name, length = struct.unpack(">4sq", head)
        if name == b"data" or length < 0:
            return SoundHeader(truncated=start + 12 + length > size)
        start += 12 + length
    return SoundHeader()


def _flac(head: bytes) -> SoundHeader:
    """Read STREAMINFO (RFC 9639, section 8.2)."""
    (packed,) = struct.unpack(">Q", head[18:26])
    md5 = head[26:42]
    return SoundHeader(
        compressed=True,
        samples=(packed & (1 << 36) - 1) or None,
        bits=(packed >> 36 & 31) + 1,
        md5=md5 if any(md5) else b"",
    )


def _ogg(file: BinaryIO, size: int) -> SoundHeader:
    """Walk along the pages (RFC 3533, section 6); a stream begins where a page has the flag of the first."""
    begins: list[int] = []
    start, flags, in_head, mixed = 0, 0, False, False
    while start < size:
        file.seek(start)
        page = file.read(27)
        if page[:4] != b"OggS" or len(page) < 27:
            following = _next_page(file, start + 1)
            if following is None:
                break
            start = following
            continue
        length = 27 + page[26] + sum(file.read(page[26]))
        if start + length > size:
            return SoundHeader(compressed=True, truncated=True)
        flags = page[5]
        if flags & _OGG_FIRST:
            mixed = mixed or in_head  # two streams side by side, such as picture and sound
            begins += [] if in_head else [start]
        in_head = bool(flags & _OGG_FIRST)
        start += length
    if not begins:
        return SoundHeader(compressed=True, truncated=True)
    note = "" if flags & _OGG_LAST else "has no mark at its end: it may have been cut off between two pages"
    links = tuple(zip(begins, [*begins[1:], size], strict=True))
    return SoundHeader(compressed=True, note=note, links=() if mixed else links)


def _next_page(file: BinaryIO, start: int) -> int | None:
    """Return the place of the next page from `start`, past what is none; None if there is no more."""
    file.seek(start)
    kept = b""
    while content := file.read(_HEAD):
        if (place := (kept + content).find(b"OggS")) >= 0:
            return start - len(kept) + place
        start += len(content)
        kept = (kept + content)[-3:]
    return None


def _samples_of_mp3(head: bytes) -> int | None:
    """Return the samples that a Xing or VBRI header in the first frame promises; None if there is neither."""
    version_1, layer_3, mono = head[1] & 0x18 == 0x18, head[1] & 0x06 == 0x02, head[3] >> 6 == 3
    if not layer_3:
        return None
    per_frame, xing = 1152 if version_1 else 576, 4 + ((17 if mono else 32) if version_1 else (9 if mono else 17))
    if head[xing : xing + 4] in (b"Xing", b"Info") and len(head) >= xing + 12 and head[xing + 7] & 1:
        return per_frame * struct.unpack(">I", head[xing + 8 : xing + 12])[0]
    if head[36:40] == b"VBRI" and len(head) >= 54:
        return per_frame * struct.unpack(">I", head[50:54])[0]
    return None
