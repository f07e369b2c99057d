"""Read and write the documents of the product: JSON and lines of JSON; `models.yaml_document` reads YAML.

A reader opens regular files of a bounded size only, so that neither a pipe nor a device nor a huge file can hold up a
command, and it checks the content against the type that the caller names. The types stand beside what writes the
documents. A `DamagedDocument` names the file, the field, and what mends it.

A document that a command needs is read by `read_json`, which raises. Files whose lines only inform are
read by `Lines`, which passes over a damaged line and counts it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Generic, TypeVar, get_args, get_type_hints

import msgspec

from models.atomic_write import write_whole
from models.disk_errors import patiently
from models.later_fields import values_before
from models.readable import kind_of

T = TypeVar("T")

LARGEST = 16 << 20
"""Bytes of a JSON document. Parsed, a document takes at most about 24 times its size."""
LARGEST_LIST = 32 << 20
"""Bytes of a JSON document that lists all shards of a set or all tensors of a checkpoint."""
_LONGEST_LINE = 1 << 20

Natural = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
"""A whole number from 0."""
Positive = Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
"""A whole number from 1."""
Size = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
"""The size of a part of a model. A larger one would only ask for more memory than there is."""
Moment = Annotated[float, msgspec.Meta(ge=0, le=250_000_000_000)]
"""Seconds since 1970, up to a year that calendars know."""

_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "null": "null",
    "object": "an object",
    "array": "a list",
}


class DamagedDocument(ValueError):
    """A document can't be read, or its content is not of its type."""


def damaged(where: object, what: object, mend: str) -> DamagedDocument:
    """Return the error of a damaged document: where it is, what is wrong, and what mends it."""
    return DamagedDocument(f"{where} is damaged ({what}): {mend}")


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file to read its bytes. Opening anything else, such as a pipe, neither blocks nor succeeds.

    Raises:
        ValueError: the path is a folder, a pipe, a socket or a device.
        OSError: the file is missing or can't be read.
    """
    _require_regular(path, os.stat(path).st_mode)  # noqa: PTH116 (before opening: opening some devices acts on them)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        _require_regular(path, os.fstat(descriptor).st_mode)
        yield file


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"it is {kind_of(mode)}, not a file")


def read_bytes(path: Path, *, mend: str, most: int = LARGEST) -> bytes:
    """Read a regular file of at most `most` bytes, again after an error of its disk that may pass.

    Raises:
        DamagedDocument: the path is no regular file, or the file is larger. `mend` says what mends it.
        FileNotFoundError: there is no file.
        OSError: the file can't be read.
    """

    def read() -> bytes:
        with opened(path) as file:
            return file.read(most + 1)

    try:
        content = patiently(read)
    except ValueError as error:
        raise damaged(path, error, mend) from None
    if len(content) > most:
        raise damaged(path, f"it has more than {most >> 10} KiB", mend)
    return content


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path: Path, kind: type[T], *, mend: str, most: int = LARGEST, finite: bool = False) -> T:
    """Read a JSON document and check it against a type.

    Args:
        path: the document.
        kind: the type of its content, see `fits`.
        mend: what a user can do about a damaged document, as a phrase that follows a colon.
        most: the largest size in bytes.
        finite: whether to refuse the numbers NaN and Infinity.

    Raises:
        DamagedDocument: the path is no regular file, or its content is not JSON or not of the type.
        FileNotFoundError: there is no file.
        OSError: the file can't be read.
    """
    return parse_json(read_bytes(path, mend=mend, most=most), kind, path, mend=mend, finite=finite)


def parse_json(content: bytes | str, kind: type[T], where: object, *, mend: str, finite: bool = False) -> T:
    """Parse JSON and check it against a type, as `read_json` does; errors name `where` as the place of the JSON."""
    try:
        return _parsed(content, kind, finite=finite)
    except ValueError as error:
        raise damaged(where, error, mend) from None


def _parsed(content: bytes | str, kind: type[T], *, finite: bool = False) -> T:
    """Parse JSON and check it against a type; raise ValueError with what is wrong."""
    strict: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
    try:
        value = json.loads(content if isinstance(content, str) else content.decode("utf-8-sig"), **strict)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    return _of_type(value, kind)


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def fits(value: Any, kind: type[T], where: object, *, mend: str) -> T:
    """Check a parsed value against a type, and return it as that type.

    A dataclass, or a list of them, takes exactly its own fields and is returned. Anything else, such as a `TypedDict`,
    is returned as it was parsed, also with fields that the type does not name.

    Raises:
        DamagedDocument: a field is missing, unknown or of another type. The message names it.
    """
    try:
        return _of_type(value, kind)
    except ValueError as error:
        raise damaged(where, error, mend) from None


def _of_type(value: Any, kind: type[T]) -> T:
    try:
        converted = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_explained(str(error))) from None
    if unknown := next(_unknown(value, kind), None):
        raise ValueError(f"it has an unknown field `{unknown}`")
    return converted if any(dataclasses.is_dataclass(part) for part in (kind, *get_args(kind))) else value


def build(kind: type[T], values: Any, where: object, *, mend: str) -> T:
    """Check values against a dataclass as `fits` does, but build it from the values as they are.

    `fits` turns the 1 of a field for real numbers into 1.0. A hash of the fields would change by that. A field that was
    added later, and that the values lack, gets the value that it means in an older file.
    """
    fits(values, kind, where, mend=mend)
    return kind(**{**values_before(kind), **values})


def _explained(problem: str) -> str:
    """Return a validation error of msgspec in plain words, with the field first."""
    reason, _, place = problem.partition(" - at `$")
    reason = re.sub(r"`([\w | ]+)`", _named, reason) if reason.startswith("Expected") else reason
    field = place.rstrip("`").lstrip(".")
    reason = reason[:1].lower() + reason[1:]
    return f"`{field}`: {reason}" if field else reason


def _named(match: re.Match[str]) -> str:
    words = match[1].split(" | ")
    return " or ".join(_NAMES.get(word, f"`{word}`") for word in words)


def _unknown(value: Any, kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield the fields of an object, at any depth, that its dataclass does not have."""
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        hints = get_type_hints(kind)
        known = {field.name for field in dataclasses.fields(kind)}
        for name, item in value.items():
            if name not in known:
                yield f"{prefix}{name}"
            else:
                yield from _unknown(item, hints[name], f"{prefix}{name}.")
    elif isinstance(value, list):
        for inner in get_args(kind):
            for item in value:
                yield from _unknown(item, inner, prefix)


def write_json(
    path: Path, value: Any, *, indent: int | None = None, ascii: bool = True, end: str = "", durable: bool = True
) -> None:
    """Write a JSON document, which appears whole or not at all.

    Args:
        path: the document; its folder is created if it is missing.
        value: what to write; a dataclass is written as an object of its fields.
        indent: spaces of each level; None: the document has one line.
        ascii: whether other letters are escaped.
        end: text after the document, such as a line break.
        durable: see `write_whole`.
    """
    write_whole(path, to_json(value, indent=indent, ascii=ascii) + end, durable=durable)


def to_json(value: Any, *, indent: int | None = None, ascii: bool = True) -> str:
    """Return a value, or a dataclass as an object of its fields, as JSON."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return json.dumps(plain, indent=indent, ensure_ascii=ascii)


# --- lines of JSON ----------------------------------------------------------------------------------------------------


class Lines(Generic[T]):
    """The lines of a JSONL file, read one by one. A file that is missing has none.

    A line that is torn, or not of the type, is passed over and counted. So is a path that can't be read at all. After
    the lines have been read, `remark` says what was passed over.

    Attributes:
        path: the file.
        damaged: how many lines were passed over.
        first: what is wrong with the first of them.
        problem: why the file can't be read; empty if it can.
        error: the OSError behind `problem`, for callers that must not take an unreadable file for an empty one.
    """

    def __init__(self, path: Path, kind: type[T]) -> None:
        """Name the file, and the type of its lines, see `fits`."""
        self.path, self.kind = path, kind
        self.damaged, self.first, self.problem = 0, "", ""
        self.error: OSError | None = None

    def __iter__(self) -> Iterator[T]:
        for _, value in self.pairs():
            yield value

    def pairs(self, *, tail: int | None = None) -> Iterator[tuple[bytes, T]]:
        """Yield each undamaged line, as bytes without its line break, and its content.

        Args:
            tail: read only so many bytes at the end of the file; the line that they begin in is left out.
        """
        self.damaged, self.first, self.problem, self.error = 0, "", "", None
        try:
            with opened(self.path) as file:
                if tail is not None and (size := os.fstat(file.fileno()).st_size) > tail:
                    file.seek(size - tail)
                    file.readline(tail)
                yield from self._pairs(file)
        except (FileNotFoundError, NotADirectoryError):
            return
        except (ValueError, OSError) as error:
            self.problem = str(error)
            self.error = error if isinstance(error, OSError) else None

    def require_readable(self) -> None:
        """Raise the OSError that ended the reading, if there was one."""
        if self.error is not None:
            raise self.error

    def _pairs(self, file: BinaryIO) -> Iterator[tuple[bytes, T]]:
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            try:
                if len(line) > _LONGEST_LINE:
                    raise ValueError(f"it has more than {_LONGEST_LINE >> 10} KiB")
                value = _parsed(line, self.kind)
            except ValueError as error:
                self.damaged += 1
                self.first = self.first or f"line {number}: {error}"
                continue
            yield line, value

    @property
    def remark(self) -> str:
        """What was passed over, in a sentence; empty if nothing was."""
        if self.problem:
            return f"{self.path} can't be read and is passed over: {self.problem}"
        if not self.damaged:
            return ""
        count = "1 damaged line is" if self.damaged == 1 else f"{self.damaged} damaged lines are"
        return f"{count} passed over in {self.path} ({self.first})"


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines without their line breaks. Of a line that is too long, one byte more than the limit is kept."""
    while line := file.readline(_LONGEST_LINE + 1):
        part = line
        while len(part) == _LONGEST_LINE + 1 and not part.endswith(b"\n"):
            part = file.readline(_LONGEST_LINE + 1)
        yield line.rstrip(b"\r\n")


def append_lines(path: Path, values: Iterable[Any], *, durable: bool = False) -> None:
    """Append values, or dataclasses as objects of their fields, to a JSONL file; `durable`: flush them to the disk.

    If the last line is torn, the new ones begin on a line of their own.
    """
    content = "".join(to_json(value) + "\n" for value in values).encode()
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            content = (b"" if file.read(1) == b"\n" else b"\n") + content
        file.write(content)
        file.flush()
        if durable:
            os.fsync(file.fileno())
