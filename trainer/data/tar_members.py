"""Finds the files in a tar, all of them or none.

Python's `tarfile` passes over what a set of latents must not lose. It takes a damaged header for the end of the
archive, it stops at the end of the first of several joined tars, and it gives a sparse member's first offset as if its
content were in one piece. This module believes a header only if its checksum is right and its sizes fit into the file,
and it refuses each kind of member that it does not know.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
"""A tar consists of blocks of this many bytes: a header, then the member's content, padded with zeros."""

_END = 2 * BLOCK  # bytes of zeros that mark the end of the archive
_PIECE = 1 << 20  # bytes that are read at a time
# An extended header holds a name, or extended attributes, of which Linux allows 64 KiB.
_LONGEST_EXTENSION = 128 << 10
_LONGEST_SHOWN = 300  # characters of a name in an error
_LONGEST_CHAIN = 40  # links that are followed one after another, as many as Linux follows

_FILES = (b"0", b"\0", b"7")
_HARD_LINK, _SYMBOLIC_LINK, _FOLDER = b"1", b"2", b"5"
_SPECIAL_FILES = (b"3", b"4", b"6")
_NO_FILES = (b"D", b"V")  # GNU tar's list of a folder's files, and the archive's label
_EXTENSIONS = (b"L", b"K", b"x", b"X", b"g")
_SPARSE, _CONTINUED = b"S", b"M"
_EMPTY = (_HARD_LINK, _SYMBOLIC_LINK, _FOLDER, *_SPECIAL_FILES)
_SPARSE_RECORDS = ("GNU.sparse.", "SCHILY.realsize", "SUN.holesdata")
_CONTINUED_RECORDS = ("GNU.volume.filename", "GNU.volume.offset", "GNU.volume.size")
_OF_ONE_MEMBER = {"path", "linkpath", "size"}
_DECIMAL = re.compile(rb"[0-9]{1,20}")
_OCTAL = re.compile(rb" *([0-7]*)(?:[ \0].*)?", re.DOTALL)

_PACK_AGAIN = "unpack the tar and pack the files again"
_SPARSE_REASON = f"a sparse member, whose content is not in one piece: {_PACK_AGAIN}, without `--sparse`"
_CONTINUED_REASON = f"a part of a file that begins in another volume: {_PACK_AGAIN}, without `--multi-volume`"

_APPLE_DOUBLE = b"\x00\x05\x16\x07"
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")


class TarMember(NamedTuple):
    """A member of a tar that has content, or that a link gives content."""

    name: str
    """The path, without a leading `/` or `./`."""
    offset: int
    """Where the content begins, in bytes from the start of the tar."""
    size: int
    """The bytes of the content."""
    lack: str = ""
    """Why the tar does not hold the content of this member, as a predicate; empty if the tar does."""


class _Header(NamedTuple):
    at: int
    type: bytes
    name: str
    link: str
    size: int

    @property
    def content(self) -> int:
        """The offset of the content."""
        return self.at + BLOCK

    @property
    def end(self) -> int:
        """The offset of the next header."""
        return self.content - (-self.size // BLOCK) * BLOCK


def find_tar_members(path: Path) -> list[TarMember]:
    """Return the files of a tar and the links to them, in their order.

    Folders, the label of an archive and AppleDouble files (`._NAME`, macOS's own attributes of the file NAME) are left
    out.

    Raises:
        ValueError: the tar is damaged, truncated, compressed or joined of several; or it holds a member that can't be
            read in place: a sparse one, a part of one, or one of an unknown kind.
        OSError: the tar can't be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
        raise ValueError(f"{path} is not a regular file")
    with path.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        return tar_members(
            path, os.fstat(descriptor).st_size, lambda start, end: os.pread(descriptor, end - start, start)
        )


def tar_members(where: object, size: int, read: Callable[[int, int], bytes]) -> list[TarMember]:
    """Return the members of `find_tar_members` of a tar anywhere; raises ValueError as that does.

    Args:
        where: the tar's name in errors.
        size: its bytes.
        read: returns the bytes from a first to a last offset, exclusive, and fewer only at the end of the tar.
    """
    return _members(_Tar(where, size, read))


def is_apple_double(path: Path) -> bool:
    """Whether a file holds macOS's attributes of another file: its name begins with `._`, and its content says so."""
    if not path.name.startswith("._") or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_APPLE_DOUBLE)) == _APPLE_DOUBLE


def shown(name: str) -> str:
    """Return a name as one line of text, with escapes for all that can't be printed and without a long middle."""
    if len(name) > _LONGEST_SHOWN:
        name = f"{name[: _LONGEST_SHOWN // 2]}…{name[-_LONGEST_SHOWN // 2 :]}"
    return name if name.isprintable() else ascii(name)


class _Tar:
    """An open tar. Its methods raise ValueError, which names the tar."""

    def __init__(self, path: object, size: int, read: Callable[[int, int], bytes]):
        self.path, self.size, self._read = path, size, read

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes at `offset`, or fewer at the end of the file."""
        return self._read(offset, offset + length)

    def damage(self, reason: str) -> ValueError:
        """Return the error of a tar whose bytes are not those of a whole tar."""
        return ValueError(f"{self.path} is not a whole tar file: {reason}")

    def unreadable(self, header: _Header, reason: str) -> ValueError:
        """Return the error of a tar with a member that can't be read in place."""
        return ValueError(f"{self.path} holds {shown(header.name)} at byte {header.at}, {reason}")

    def expect_content(self, header: _Header) -> None:
        """Refuse a header whose content would exceed the file."""
        if header.content + header.size > self.size:
            held = max(0, self.size - header.content)
            raise self.damage(
                f"{shown(header.name)} at byte {header.at} has {held} bytes, but its header says {header.size}"
            )

    def expect_end(self, offset: int) -> None:
        """Refuse a tar that does not end with zeros from `offset` on."""
        for at in range(offset, self.size, _PIECE):
            piece = self.read(at, _PIECE)
            if piece != bytes(len(piece)):
                raise self._more_than_zeros(at + len(piece) - len(piece.lstrip(b"\0")))
        if self.size - offset < _END:
            raise self.damage("its end-of-archive marker is missing")

    def _more_than_zeros(self, offset: int) -> ValueError:
        try:
            _parse(self, self.read(offset, BLOCK), offset)
        except ValueError:
            return self.damage(f"after its end-of-archive marker, at byte {offset}, bytes of no member follow")
        return ValueError(
            f"{self.path} consists of several tars, of which the second begins at byte {offset}: "
            f"unpack it with `tar -xif` and pack the files as one tar"
        )


def _headers(tar: _Tar) -> Iterator[_Header]:
    """Yield the header of each member, with the name and size that the extended headers before it give it."""
    at, extension = 0, _Extension()
    while any(block := tar.read(at, BLOCK)):
        header = _parse(tar, block, at)
        if header.type in _EXTENSIONS:
            extension.add(tar, header)
        else:
            header = extension.applied_to(tar, header)
            extension = _Extension()
            _refuse_unreadable(tar, header)
            tar.expect_content(header)
            yield header
        at = header.end
    if extension.types:
        raise tar.damage(f"the extended header before byte {at} has no member")
    tar.expect_end(at)


def _parse(tar: _Tar, block: bytes, at: int) -> _Header:
    if len(block) < BLOCK:
        raise tar.damage(f"the file ends within the header at byte {at}")
    # The checksum is the sum of the header's bytes, with spaces in place of the checksum itself. Some old programs
    # added signed bytes.
    rest = block[:148] + b" " * 8 + block[156:]
    total, stored = sum(rest), _number(block[148:156])
    if stored != total and stored != total - 256 * sum(byte > 127 for byte in rest):
        if at == 0 and block.startswith(_COMPRESSED):
            raise ValueError(f"{tar.path} is compressed, which rules out random access: unpack it")
        raise tar.damage(f"the header at byte {at} is damaged")
    kind, size = block[156:157], _number(block[124:136])
    name, link = _text(block[:100]), _text(block[157:257])
    if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):
        name = f"{prefix}/{name}"
    if size is None:
        raise tar.damage(f"the header of {shown(name)} at byte {at} gives no valid size")
    if kind == _HARD_LINK:
        size = 0  # some programs write the size of the file to which the link leads, but its content never follows
    return _Header(at, kind, name, link, size)


def _number(field: bytes) -> int | None:
    """Return a header's number, which is octal digits, or binary after a byte 0x80; None if it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = _OCTAL.fullmatch(field)
    return int(digits[1] or b"0", 8) if digits else None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


class _Extension:
    """What the extended headers before a member say about it."""

    def __init__(self) -> None:
        self.types: set[bytes] = set()
        self.records: dict[str, bytes] = {}

    def add(self, tar: _Tar, header: _Header) -> None:
        """Read an extended header; refuses one that contradicts the ones before it."""
        if header.size > _LONGEST_EXTENSION:
            raise tar.damage(f"the extended header at byte {header.at} claims {header.size} bytes")
        tar.expect_content(header)
        content = tar.read(header.content, header.size)
        if header.type in (b"L", b"K"):
            records = {"path" if header.type == b"L" else "linkpath": content.partition(b"\0")[0]}
            if not all(records.values()):
                raise tar.damage(f"the long name at byte {header.at} is empty")
        else:
            records = _records(tar, header, content)
        if header.type == b"g":
            if found := records.keys() & _OF_ONE_MEMBER:
                raise tar.damage(f"the header at byte {header.at} gives all members the same {min(found)}")
            _refuse_records(tar, header, records)
            return
        if header.type in self.types or records.keys() & self.records.keys():
            raise tar.damage(f"the extended header at byte {header.at} contradicts the one before it")
        self.types.add(header.type)
        self.records |= records

    def applied_to(self, tar: _Tar, header: _Header) -> _Header:
        """Return a member's header with the name, link and size that the extended headers give it."""
        name, link, size = (self.records.get(key, b"") for key in ("path", "linkpath", "size"))
        if name:
            header = header._replace(name=_text(name))
        if link:
            header = header._replace(link=_text(link))
        if size and header.type != _HARD_LINK:
            if not _DECIMAL.fullmatch(size):
                raise tar.damage(f"the extended header of {shown(header.name)} at byte {header.at} gives no valid size")
            header = header._replace(size=int(size))
        named = self.records.get("GNU.sparse.name")
        _refuse_records(tar, header._replace(name=_text(named)) if named else header, self.records)
        return header


def _records(tar: _Tar, header: _Header, content: bytes) -> dict[str, bytes]:
    """Return the records `LENGTH KEY=VALUE` of an extended header; each length counts its whole record."""
    records, at = {}, 0
    content = content.rstrip(b"\0")
    while at < len(content):
        digits = content[at : at + 10].partition(b" ")[0]
        end = at + int(digits) if _DECIMAL.fullmatch(digits) else 0
        key, equals, value = content[at + len(digits) + 1 : end - 1].partition(b"=")
        if not at < end <= len(content) or content[end - 1 : end] != b"\n" or not equals:
            raise tar.damage(f"the extended header at byte {header.at} is damaged")
        records[_text(key)] = value
        at = end
    return records


def _refuse_records(tar: _Tar, header: _Header, records: Iterable[str]) -> None:
    for key in records:
        if key.startswith(_SPARSE_RECORDS):
            raise tar.unreadable(header, _SPARSE_REASON)
        if key.startswith(_CONTINUED_RECORDS):
            raise tar.unreadable(header, _CONTINUED_REASON)


def _refuse_unreadable(tar: _Tar, header: _Header) -> None:
    """Refuse a member whose content, or the next header, can't be found for certain."""
    if not header.name:
        raise tar.damage(f"the member at byte {header.at} has no name")
    if header.type == _SPARSE:
        raise tar.unreadable(header, _SPARSE_REASON)
    if header.type == _CONTINUED:
        raise tar.unreadable(header, _CONTINUED_REASON)
    if header.type not in (*_FILES, *_NO_FILES, *_EMPTY):
        raise tar.unreadable(header, f"a member of the unknown kind {header.type!r}: {_PACK_AGAIN}")
    if header.size and (header.type in _EMPTY or _is_folder(header)):
        raise tar.unreadable(header, f"a folder, link or special file with content of its own: {_PACK_AGAIN}")


def _is_folder(header: _Header) -> bool:
    """Whether a member is a folder, which old programs tell from a file only by a slash at the end of its name."""
    return header.type == _FOLDER or (header.type in _FILES and header.name.endswith("/"))


def _members(tar: _Tar) -> list[TarMember]:
    """Return the members of `find_tar_members`."""
    members: list[TarMember] = []
    files: dict[str, TarMember] = {}
    links: dict[str, str] = {}
    for header in _headers(tar):
        name = _clean(header.name)
        if _is_folder(header) or header.type in _NO_FILES or _holds_apple_double(tar, name, header):
            continue
        member = TarMember(name, header.content, header.size)
        if header.type in (_HARD_LINK, _SYMBOLIC_LINK):
            target = _target(header)
            if header.type == _SYMBOLIC_LINK or target in files or target in links:
                links[name] = target
            else:
                member = member._replace(lack=f"is a hard link to {shown(header.link)}, which is no member before it")
        elif header.type in _SPECIAL_FILES:
            member = member._replace(lack="is a pipe or a device")
        else:
            files[name] = member
        members.append(member)
    return [_followed(member, files, links) if member.name in links else member for member in members]


def _clean(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _target(header: _Header) -> str:
    """Return the name of the member to which a link leads; an absolute path, which leads out of the tar, stays so."""
    if header.type == _HARD_LINK:
        return _clean(header.link)
    return posixpath.normpath(posixpath.join(posixpath.dirname(_clean(header.name)), header.link))


def _holds_apple_double(tar: _Tar, name: str, header: _Header) -> bool:
    if not posixpath.basename(name).startswith("._") or header.size < len(_APPLE_DOUBLE):
        return False
    return tar.read(header.content, len(_APPLE_DOUBLE)) == _APPLE_DOUBLE


def _followed(member: TarMember, files: dict[str, TarMember], links: dict[str, str]) -> TarMember:
    """Return a link with the content of the file to which it leads."""
    target = member.name
    for _ in range(_LONGEST_CHAIN):
        target = links.get(target, target)
    if target in files:
        return files[target]._replace(name=member.name)
    return member._replace(lack=f"is a link to {shown(links[member.name])}, which the tar does not hold")
