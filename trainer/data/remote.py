"""Remote sets (`http(s)://`, `s3://`, `gs://` and all else that fsspec opens), cached locally as whole shards.

Each node has one cache folder, which all its processes share and which never exceeds its size limit. The state of the
cache is in its file names and file locks alone, so a killed process leaves nothing to clean up:

* `NAME.tar` is complete. Every reader holds a shared lock on the file. Files without readers may be evicted, the least
  recently used first.
* `NAME.tar.SIZE.part` is a partial download, for which SIZE bytes are reserved. The process that downloads holds an
  exclusive lock on the file. If that process dies, the lock is released and another process resumes the download.
* `lock` is held while files are renamed or evicted, but never during a download.
"""

from __future__ import annotations

import fcntl
import io
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import quote

from models.atomic_write import write_whole
from models.disk_errors import LASTING, PASSING, with_number
from models.documents import LARGEST_LIST
from models.ranges import ranged
from trainer.data.bounded_reads import TooLongError, read_range, read_whole
from trainer.data.cache_folder import claim, default_folder, open_own, own_folder, set_folders
from trainer.data.index_row import LONGEST_INDEX_ROW
from trainer.data.set_description import read_description
from trainer.file_names import printable
from trainer.urls import without_credentials

logger = logging.getLogger(__name__)

_SMALLEST_PIECE, _LARGEST_PIECE = 256 << 10, 16 << 20  # bytes per request
_LONGEST_PAUSE = 30.0  # seconds between two attempts
_HTTP_TIMEOUT = 60.0  # seconds without a byte after which an HTTP request fails
_WARNING_INTERVAL = 30.0  # seconds
_INDEX_HEADER = 64 << 10  # bytes, more than numpy writes before the rows
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # errors of botocore
_FULL_CACHE_PAUSE = 0.05  # seconds between two attempts to make room in a cache whose shards are all in use


class MissingFileError(Exception):
    """A remote file is missing, or shorter than the set's index says. Retrying would not help."""


class NoSetError(ValueError):
    """There is no set at a folder or a URL."""


def is_url(location: str | Path) -> bool:
    """Whether a location is a URL, which fsspec opens, rather than a local path."""
    return "://" in str(location)


@dataclass
class CacheSettings:
    """The node's cache of remote shards, and how downloads are retried."""

    folder: str | None = None
    """A folder on a disk of the node; None: `spresso-USER` in `$SLURM_TMPDIR` or the system's temporary folder. Where
    others may write to the folder, the cache is `spresso-USER` in it."""
    gib: float = ranged(50.0, above=0)
    """The size limit of all shards in the cache, in GiB."""
    patience: float = ranged(600.0, above=0, unlimited=True)
    """Seconds for which a failing request is repeated, by `prepare` too."""
    fetchers: int = ranged(4, least=1)
    """Shards that each rank fetches at the same time."""

    @property
    def limit(self) -> int:
        """The size limit of all shards in the cache, in bytes."""
        return int(self.gib * 2**30)

    @property
    def path(self) -> Path:
        """The cache folder, with its default filled in. `cache_folder.claim` may take a folder of this user in it."""
        return default_folder() if self.folder is None else Path(self.folder).expanduser()


class Remote:
    """Fetches files below a URL, and retries failed requests.

    Args:
        url: the URL of a folder.
        patience: seconds to retry a request for.

    Raises:
        ValueError: the package that opens such URLs is not installed, or the URL is invalid.
    """

    def __init__(self, url: str, *, patience: float):
        import fsspec  # imported here because the import is slow and most sets are local

        if _is_http(url) and "#" in url:
            raise ValueError(
                f"{url} holds a #, and what follows # is not sent to a server: write %23 for a # in a folder's name"
            )
        self.url, self.patience = url.rstrip("/"), patience
        self.interrupted = threading.Event()
        """While this event is set, failed requests are not retried."""
        try:
            self._filesystem, self._root = fsspec.core.url_to_fs(self.url, **_options(self.url))
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url} can't be opened: {error}") from error

    def content(self, name: str, *, most: int) -> bytes:
        """Return the content of a small file. Raises the errors of `append`, ValueError for more than `most` bytes."""
        path = self._path(name)
        return self._retry(name, lambda: read_whole(self._filesystem, path, most=most, seconds=self._slowest))

    def size(self, name: str) -> int:
        """Return the size of a file in bytes. Raises the errors of `append`."""

        def request() -> int:
            try:
                return int(self._filesystem.info(self._path(name))["size"])
            except FileNotFoundError as error:
                # Over HTTP, fsspec raises FileNotFoundError for all failures, even a status 500 or a lost connection.
                cause = error.__cause__
                if isinstance(cause, TimeoutError) or (cause and type(cause).__module__.startswith("aiohttp")):
                    raise cause from None
                raise

        return int(self._retry(name, request))

    def append(self, name: str, file: io.FileIO, size: int) -> None:
        """Fetch the rest of a remote file and append it to `file`, until that has `size` bytes.

        Raises:
            MissingFileError: the remote file is missing, or has fewer than `size` bytes.
            ValueError: access is denied, requests failed for `patience` seconds, or `interrupted` is set.
        """
        path, piece = self._path(name), _LARGEST_PIECE

        def fetch() -> bytes:
            nonlocal piece
            wanted = min(piece, size - at)
            piece = max(_SMALLEST_PIECE, wanted // 2)  # if this request fails, the next one is smaller
            content = read_range(self._filesystem, path, at, at + wanted, size=size, seconds=self._slowest)
            if len(content) == size > wanted:  # the server ignores ranges and sent the whole file
                content = content[at:]
            elif len(content) != wanted:
                raise MissingFileError(f"{self._named(name)} has fewer than the {size} bytes that its index says")
            piece = min(_LARGEST_PIECE, 4 * piece)
            return content

        while (at := os.fstat(file.fileno()).st_size) < size:
            file.write(self._retry(name, fetch))

    @property
    def _slowest(self) -> float:
        """Seconds that one request may take: a server that sends a byte now and then would hold it for ever."""
        return max(self.patience, _HTTP_TIMEOUT)

    def _path(self, name: str) -> str:
        """Return where a file is. In a URL of HTTP a name's `%`, `#`, `?` and so on are escaped; S3 and others take
        names as they are."""
        return f"{self._root}/{quote(name, errors='surrogateescape') if _is_http(self.url) else name}"

    def _named(self, name: str) -> str:
        return f"{self.url}/{printable(name)}"

    def _retry(self, name: str, attempt: Callable[[], Any]) -> Any:
        """Call `attempt` until it succeeds, fails finally, or `patience` seconds have passed; return its result."""
        start, warned, pause = time.monotonic(), -math.inf, 0.5
        while True:
            try:
                return attempt()
            except MissingFileError:
                raise
            except TooLongError:
                raise ValueError(f"{self._named(name)} is longer than it may be, and was not fetched") from None
            except Exception as error:  # the errors of fsspec's backends share no base class
                self._raise_if_final(name, error)
                reason = without_credentials(f"{type(error).__name__} {error}".strip())
                now = time.monotonic()
                if now - start > self.patience:
                    raise ValueError(
                        f"{self._named(name)} could not be fetched for {self.patience:g} s; the last error was "
                        f"{reason}. Run the same command again once the server responds: all that was fetched is kept"
                    ) from error
            if now - warned > _WARNING_INTERVAL:
                left = start + self.patience - now
                logger.warning("%s: %s; retrying for %.0f s", self._named(name), reason, left)
                warned = now
            if self.interrupted.wait(pause * random.uniform(0.5, 1.5)):
                raise ValueError(f"{self._named(name)} was not fetched, because the reader was closed")
            pause = min(_LONGEST_PAUSE, 2 * pause)

    def _raise_if_final(self, name: str, error: Exception) -> None:
        status = getattr(error, "status", None) or getattr(error, "status_code", None)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise MissingFileError(f"{self._named(name)} is missing") from error
        if status == 416:  # the requested range begins after the end of the file
            raise MissingFileError(f"{self._named(name)} has fewer bytes than its index says") from error
        if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _NO_CREDENTIALS:
            why = without_credentials(str(error))
            raise ValueError(f"access to {self._named(name)} is denied, check the credentials: {why}") from error


class ShardCache:
    """The local copy of a set at a URL: its index, and those of its shards that are cached.

    Attributes:
        url: the URL of the set's folder.
        folder: the local folder with `set.json`, `index.npy` and the cached shards.
        settings: the settings of this node's cache.
        remote: fetches the set's files.

    Args:
        url: the URL of the set's folder.
        settings: the settings of this node's cache, which all sets share.

    Raises:
        NoSetError: there is no set at the URL.
        ValueError: the index can't be fetched, or the cache can't be written.
    """

    def __init__(self, url: str, settings: CacheSettings):
        self.url, self.settings, self._all_sets = url.rstrip("/"), settings, settings.path
        self.remote = Remote(url, patience=settings.patience)
        try:
            description = self.remote.content("set.json", most=LARGEST_LIST)
            # The folder's name depends on set.json, so that shards of an old set are never used for a new set at the
            # same URL.
            name = blake2b(self.url.encode() + b"\0" + description, digest_size=8).hexdigest()
            with self._disk_errors_explained():
                self._all_sets = claim(settings.path if settings.folder is not None else None)
                self.folder = own_folder(self._all_sets / name)
                with self._lock():
                    write_whole(self.folder / "set.json", description)
            with self._complete("index.npy", self._index_size()):
                pass
        except MissingFileError as error:
            raise NoSetError(
                f"{error}: give the URL of a folder with train/ and test/, as `spresso prepare` makes it"
            ) from error

    def _index_size(self) -> int:
        """Return the bytes of the remote index; raises ValueError if `set.json` or the cache allow fewer."""
        size, samples = self.remote.size("index.npy"), read_description(self.folder, self.url)["samples"]
        if size > samples * LONGEST_INDEX_ROW + _INDEX_HEADER:
            raise ValueError(f"{self.url}/index.npy has {size} bytes, too many for {samples} samples")
        if size > self.settings.limit:
            raise self._too_large("the index", size)
        return size

    @contextmanager
    def open(self, name: str, size: int) -> Iterator[io.FileIO]:
        """Open the shard `name` of `size` bytes; fetches the shard if needed, and keeps it cached while it is open.

        Raises:
            MissingFileError: the remote shard is missing, or has fewer than `size` bytes.
            ValueError: the shard can't be fetched, or does not fit in the cache.
        """
        with self._complete(name, size) as file:
            os.utime(file.fileno())  # mark the shard as the most recently used
            yield file

    @contextmanager
    def _complete(self, name: str, size: int) -> Iterator[io.FileIO]:
        """Open a file of the set under a shared lock, after fetching the file if needed."""
        path = self.folder / name
        while True:
            try:
                file = open_own(path, os.O_RDONLY)
            except FileNotFoundError:
                if (fetched := self._fetch(path, size)) is None:
                    continue
                file = fetched
            with file:
                fcntl.flock(file, fcntl.LOCK_SH)
                if _exists(file):  # the file may have been evicted before it was locked
                    yield file
                    return

    def _fetch(self, path: Path, size: int) -> io.FileIO | None:
        """Fetch a file; None means to try again: another process has fetched the file, or the cache had no room."""
        with self._disk_errors_explained():
            if (part := self._open_partial(path, size)) is None:
                time.sleep(_FULL_CACHE_PAUSE)
                return None
            try:
                fcntl.flock(part, fcntl.LOCK_EX)
                if not path.exists() and _exists(part):
                    self.remote.append(path.name, part, size)
                    with self._lock():
                        Path(part.name).rename(path)
                    return part
            except MissingFileError:
                with self._lock():
                    Path(part.name).unlink(missing_ok=True)
                part.close()
                raise
            except BaseException:
                part.close()
                raise
            part.close()
            return None

    def _open_partial(self, path: Path, size: int) -> io.FileIO | None:
        """Open the partial download of a file, with room reserved for the whole file; None if there is no room."""
        part = path.with_name(f"{path.name}.{size}.part")
        with self._lock():
            if part.exists() or path.suffix != ".tar" or self._make_room(size):
                return open_own(part, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        return None

    def _make_room(self, size: int) -> bool:
        """Evict the least recently used shards until `size` bytes fit; returns whether they do."""
        if size > self.settings.limit:
            raise self._too_large("a shard", size)
        folders = set_folders(self._all_sets)
        files = [(path, path.lstat()) for kind in ("*.tar", "*.tar.*.part") for at in folders for path in at.glob(kind)]
        sizes = {path: _reserved_bytes(path, status) for path, status in files}
        total = sum(sizes.values())
        for path, _ in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if total + size <= self.settings.limit:
                break
            if _remove_if_unused(path):
                total -= sizes[path]
        return total + size <= self.settings.limit

    def _too_large(self, what: str, size: int) -> ValueError:
        return ValueError(
            f"{what} of {self.url} has {size / 2**20:.0f} MiB, more than data.cache.gib={self.settings.gib:g}: "
            f"raise data.cache.gib"
        )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with open_own(self._all_sets / "lock", os.O_RDWR | os.O_CREAT) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _disk_errors_explained(self) -> Iterator[None]:
        """Explain an OSError in the block, which comes from the cache's disk.

        One that lasts until a person acts becomes a ValueError. One that may pass stays an OSError of its number.
        """
        try:
            yield
        except OSError as error:
            message = (
                f"the cache {self._all_sets} can't be written: {error.strerror}; give another data.cache.folder, or "
                f"lower data.cache.gib={self.settings.gib:g}"
            )
            if error.errno in PASSING - LASTING:
                raise with_number(error.errno, message) from error
            raise ValueError(message) from error


def _options(url: str) -> dict[str, Any]:
    if not _is_http(url):
        return {}
    from aiohttp import ClientTimeout

    return {
        "client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=_HTTP_TIMEOUT, sock_read=_HTTP_TIMEOUT)}
    }


def _is_http(url: str) -> bool:
    return url.partition("://")[0].lower() in ("http", "https")


def _exists(file: io.FileIO) -> bool:
    return os.fstat(file.fileno()).st_nlink > 0


def _reserved_bytes(path: Path, status: os.stat_result) -> int:
    return int(path.name.split(".")[-2]) if path.suffix == ".part" else status.st_size


def _remove_if_unused(path: Path) -> bool:
    """Remove a file that no process has locked; returns whether the file was removed."""
    with open_own(path, os.O_RDWR) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
        return True
