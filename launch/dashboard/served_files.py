"""Which files of runs are served: sounds to listen to, and listening pages; whole or a range of their bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from launch.dashboard.run_details import LISTENED

_PAGE = re.compile(r"page/(index\.html|audio/[A-Za-z0-9.-]+\.js|images/[A-Za-z0-9.-]+\.png)")
_TYPES = {
    ".flac": "audio/flac",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})")


def sound(root: Path, run: Path, path: str) -> Path | None:
    """Return a sound of a run by its path in the run's directory; None for anything else."""
    return _inside(root, run / path) if LISTENED.fullmatch(path) else None


def page_file(root: Path, run: Path, path: str) -> Path | None:
    """Return a file of a run's listening page by its path in the run's directory; None for anything else."""
    return _inside(root, run / path) if _PAGE.fullmatch(path) else None


def content_type(path: Path) -> str:
    """Return the media type of a file that is served."""
    return _TYPES[path.suffix]


@dataclass(frozen=True)
class ByteRange:
    """The bytes of a file that are sent: from `begin` up to, but without, `end`, of `size`."""

    begin: int
    end: int
    size: int
    is_range: bool = True
    """Whether a range was asked for. A browser that gets status 200 for `bytes=0-` believes that it can't seek."""

    @property
    def header(self) -> str:
        """The header `Content-Range`."""
        return f"bytes {self.begin}-{self.end - 1}/{self.size}"


def part_of(header: str | None, size: int) -> ByteRange | None:
    """Return the part that a header `Range` asks for; None if no byte of it exists.

    It is the whole file if the header asks for several parts or is malformed (RFC 9110, section 14.2).
    """
    match = _RANGE.fullmatch((header or "").strip())
    if match is None or not (match[1] or match[2]):
        return ByteRange(0, size, size, is_range=False)
    if not match[1]:
        begin, end = max(0, size - int(match[2])), size
    else:
        begin, end = int(match[1]), min(size, int(match[2]) + 1 if match[2] else size)
        if match[2] and int(match[2]) < begin:
            return ByteRange(0, size, size, is_range=False)
    return ByteRange(begin, end, size) if begin < end else None


def _inside(root: Path, path: Path) -> Path | None:
    """Return a regular file whose place, links followed, is inside the folder of runs; None for any other."""
    try:
        real = path.resolve(strict=True)
        return real if real.is_relative_to(root) and real.is_file() else None
    except (OSError, RuntimeError, ValueError):
        return None
