"""Reads the sounds of a bucket or a web server by ranges, and notices if one changes meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, unquote

import msgspec

from trainer.data.bounded_reads import read_range
from trainer.data.remote import MissingFileError, Remote
from trainer.file_names import printable
from trainer.urls import without_credentials

_PIECE = 8 << 20  # bytes per request
_THREADS = 16  # that ask for sizes
_TAGS = ("ETag", "etag", "blob_id", "generation", "md5Hash", "content_md5", "Content-MD5")
_TIMES = ("LastModified", "Last-Modified", "last_modified", "modified", "mtime", "updated")
"""What a store tells of an object's version, the surest first."""


class SourceError(OSError):
    """A source can't be read, or has changed. It is no fault of one sound, so that the work has to stop."""


class SourceFile(msgspec.Struct, frozen=True):
    """A file of a source, as it was when it was listed."""

    place: str
    """Its path or URL."""
    size: int
    """Bytes."""
    version: str
    """What changes with its content: the time of a local file, the ETag of an object."""

    @property
    def told(self) -> str:
        """The place, for people."""
        return without_credentials(printable(self.place))


class Bucket(Remote):
    """The files below a URL. Its methods raise SourceError; the message says what mends it."""

    def files(self) -> dict[str, SourceFile]:
        """Return each file below the URL, by its name relative to the URL, sorted; empty if there is none."""

        def find() -> dict[str, dict[str, Any]]:
            self._filesystem.invalidate_cache()
            return self._filesystem.find(self._root, detail=True)

        with self._told():
            found = self._retry("", find)
        root = f"{self._root.strip('/')}/"
        named = {str(path).strip("/"): facts for path, facts in found.items()}
        inside = {
            unquote(path.removeprefix(root)) if self._is_http else path.removeprefix(root): facts
            for path, facts in named.items()
            if path.startswith(root) and facts.get("type") != "directory"
        }
        with ThreadPoolExecutor(_THREADS) as pool:  # servers that list files may not tell their sizes
            unsized = [name for name, facts in inside.items() if facts.get("size") is None]
            sized = dict(zip(unsized, pool.map(self.stored, unsized), strict=True))
        return {name: sized.get(name) or self._stored(name, inside[name]) for name in sorted(inside)}

    def stored(self, name: str) -> SourceFile:
        """Return what the store tells of a file now; raises MissingFileError if it is missing, or is a folder."""

        with self._told(missing=False):
            return self._stored(name, self._retry(name, lambda: self._facts(name)))

    def _facts(self, name: str) -> dict[str, Any]:
        self._filesystem.invalidate_cache()
        try:
            facts = self._filesystem.info(self._path(name))
        except FileNotFoundError as error:
            cause = error.__cause__  # fsspec calls all failures of HTTP so
            if isinstance(cause, TimeoutError) or (cause and type(cause).__module__.startswith("aiohttp")):
                raise cause from None
            raise
        if facts.get("type") == "directory":
            raise MissingFileError(f"{self._named(name)} is a folder")
        return facts

    def read(self, name: str, start: int, end: int, size: int) -> bytes:
        """Return the bytes `start` … `end` - 1 of a file of `size` bytes, in requests of a bounded size."""
        if end - start > _PIECE:
            starts = range(start, end, _PIECE)
            return b"".join(self.read(name, at, min(end, at + _PIECE), size) for at in starts)

        def request() -> bytes:
            content = read_range(self._filesystem, self._path(name), start, end, size=size, seconds=self._slowest)
            if len(content) == size > end - start:  # the server ignores ranges and sent the whole file
                content = content[start:end]
            if len(content) != end - start:
                if self._facts(name)["size"] != size:
                    raise MissingFileError(f"{self._named(name)} has changed since it was listed")
                raise ConnectionError(f"{len(content)} bytes came in place of {end - start}")
            return content

        with self._told():
            return self._retry(name, request)

    def _stored(self, name: str, facts: dict[str, Any]) -> SourceFile:
        tags = (str(facts[key]) for key in (*_TAGS, *_TIMES) if facts.get(key))
        if facts.get("size") is None:
            raise SourceError(f"{self._named(name)} has no size that the server tells: copy it, and give the copy")
        place = f"{self.url}/{quote(name) if self._is_http else name}"
        return SourceFile(place, int(facts["size"]), next(tags, "").strip('"'))

    @property
    def _is_http(self) -> bool:
        return _is_http(self.url)

    @contextmanager
    def _told(self, *, missing: bool = True) -> Iterator[None]:
        try:
            yield
        except MissingFileError as error:
            if not missing:
                raise
            raise SourceError(f"{error}: it was removed or cut meanwhile; run the same command again") from error
        except ValueError as error:
            raise SourceError(str(error)) from error


@functools.cache
def _bucket(url: str, patience: float) -> Bucket:
    return Bucket(url, patience=patience)


def bucket_at(url: str, patience: float) -> Bucket:
    """Return the bucket at a URL, one for each process; raises ValueError if no package opens such URLs."""
    return _bucket(url.rstrip("/"), patience)


def split_url(url: str) -> tuple[str, str]:
    """Return the URL of the folder of a file, and the file's name."""
    folder, _, name = url.rstrip("/").rpartition("/")
    return folder, unquote(name) if _is_http(url) else name


def _is_http(url: str) -> bool:
    return url.partition("://")[0].lower() in ("http", "https")
