"""Sets that lie elsewhere (`http(s)://`, `s3://`, `gs://`, whatever fsspec opens): whole shards in a local cache.

The cache is one folder a node, shared by all its processes, and never larger than its limit. Files speak for themselves
and locks for those who use them, so nothing has to be cleaned up after a kill:

* `NAME.tar` is whole. Whoever reads it holds a shared lock on it; what nobody reads may be evicted, what was unused
  for longest first.
* `NAME.tar.SIZE.part` is being fetched by whoever holds its exclusive lock, and has SIZE bytes set aside. When that
  process dies the lock goes, and the next one continues where it ended.
* `lock` is held while names change or room is made, never while something is fetched.
"""

from __future__ import annotations

import fcntl
import getpass
import io
import logging
import math
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from models.atomic_write import write_whole

logger = logging.getLogger(__name__)

_SMALLEST_PIECE, _LARGEST_PIECE = 256 << 10, 16 << 20  # bytes to one request
_LONGEST_PAUSE = 30.0  # seconds between two attempts
_SILENCE = 60.0  # seconds without a byte after which an HTTP request is given up
_WARN_AGAIN = 30.0  # seconds
_NO_ROOM = 0.05  # seconds until room may have been made


class MissingFileError(Exception):
    """A remote file that is not there, or not as long as its index says: trying again would not help."""


class NoSetError(ValueError):
    """A folder or a URL where no set is."""


def is_url(location: str | Path) -> bool:
    """Whether a location is for fsspec to open."""
    return "://" in str(location)


@dataclass
class CacheSettings:
    """Where a node keeps what it fetched, and how long it waits for it."""

    folder: str | None = None
    """On a disk of the node; None: `spresso-USER` in `$SLURM_TMPDIR` or where temporary files go."""
    gib: float = 50.0
    """GiB that all shards in it may take."""
    patience: float = 600.0
    """Seconds to try again without a byte having come."""
    fetchers: int = 4
    """Shards that each rank fetches at a time."""

    @property
    def limit(self) -> int:
        """Bytes that all shards in it may take."""
        return int(self.gib * 2**30)

    @property
    def path(self) -> Path:
        """The folder."""
        if self.folder is not None:
            return Path(self.folder).expanduser()
        return Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()) / f"spresso-{getpass.getuser()}"


class Remote:
    """Files below a URL, fetched with patience.

    Args:
        url: of a folder.
        patience: seconds to try again without a byte having come.

    Raises:
        ValueError: what opens such URLs is not installed.
    """

    def __init__(self, url: str, *, patience: float):
        import fsspec  # takes a while, and most sets are local

        self.url, self.patience = url.rstrip("/"), patience
        self.interrupted = threading.Event()
        """While it is set, nothing is waited for."""
        try:
            self._filesystem, self._root = fsspec.core.url_to_fs(self.url, **_options(self.url))
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url} can't be opened: {error}") from error

    def content(self, name: str) -> bytes:
        """A whole small file. Raises as `append` does."""
        return self._patiently(name, lambda: self._filesystem.cat_file(f"{self._root}/{name}"))

    def size(self, name: str) -> int:
        """Of a file, in bytes. Raises as `append` does."""

        def ask() -> int:
            try:
                return int(self._filesystem.info(f"{self._root}/{name}")["size"])
            except FileNotFoundError as error:
                # over HTTP fsspec says so whatever went wrong, be it a 500 or a line that was cut
                cause = error.__cause__
                if isinstance(cause, TimeoutError) or (cause and type(cause).__module__.startswith("aiohttp")):
                    raise cause from None
                raise

        return int(self._patiently(name, ask))

    def append(self, name: str, file: io.FileIO, size: int) -> None:
        """Fetch what `file` lacks at its end to have `size` bytes.

        Raises:
            MissingFileError: there is no such file, or it ends earlier.
            ValueError: it may not be read, it did not come for too long, or `interrupted` is set.
        """
        path, piece = f"{self._root}/{name}", _LARGEST_PIECE

        def fetch() -> bytes:
            nonlocal piece
            wanted = min(piece, size - at)
            piece = max(_SMALLEST_PIECE, wanted // 2)  # a bad line carries only small pieces
            content = self._filesystem.cat_file(path, start=at, end=at + wanted)
            if len(content) == size > wanted:  # from a server that knows no ranges
                content = content[at:]
            elif len(content) != wanted:
                raise MissingFileError(f"{self.url}/{name} has fewer than the {size} bytes that its index says")
            piece = min(_LARGEST_PIECE, 4 * piece)
            return content

        while (at := os.fstat(file.fileno()).st_size) < size:
            file.write(self._patiently(name, fetch))

    def _patiently(self, name: str, attempt: Callable[[], Any]) -> Any:
        start, warned, pause = time.monotonic(), -math.inf, 0.5
        while True:
            try:
                return attempt()
            except MissingFileError:
                raise
            except Exception as error:  # the libraries' errors share no base class
                self._raise_if_final(name, error)
                reason = f"{type(error).__name__} {error}".strip()
                now = time.monotonic()
                if now - start > self.patience:
                    raise ValueError(
                        f"{self.url}/{name} could not be had for {self.patience:g} s, at last for {reason}. Run the "
                        f"same again when it can: what was fetched is kept"
                    ) from error
            if now - warned > _WARN_AGAIN:
                left = start + self.patience - now
                logger.warning("%s/%s: %s; trying again for %.0f s", self.url, name, reason, left)
                warned = now
            if self.interrupted.wait(pause * random.uniform(0.5, 1.5)):
                raise ValueError(f"{self.url}/{name} was not fetched: the reader was closed")
            pause = min(_LONGEST_PAUSE, 2 * pause)

    def _raise_if_final(self, name: str, error: Exception) -> None:
        status = getattr(error, "status", None)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise MissingFileError(f"{self.url}/{name} is missing") from error
        if status == 416:  # the range asked for begins behind the end
            raise MissingFileError(f"{self.url}/{name} has fewer bytes than its index says") from error
        if isinstance(error, PermissionError) or status in (401, 403):
            raise ValueError(f"{self.url}/{name} may not be read: {error}") from error


class ShardCache:
    """A set at a URL: its index and, once they are asked for, its shards on this node's disk.

    Attributes: `url`; `folder`, which holds `set.json`, `index.npy` and the shards that are here; `settings`; `remote`.

    Args:
        url: of the set's folder.
        settings: of this node's cache, which all sets share.

    Raises:
        NoSetError: there is none.
        ValueError: it can't be had, or the cache can't be written.
    """

    def __init__(self, url: str, settings: CacheSettings):
        self.url, self.settings, self._all_sets = url.rstrip("/"), settings, settings.path
        self.remote = Remote(url, patience=settings.patience)
        try:
            description = self.remote.content("set.json")
            # Another set at the same place has another folder: no shard of the old one is taken for one of the new.
            name = blake2b(self.url.encode() + b"\0" + description, digest_size=8).hexdigest()
            self.folder = self._all_sets / name
            with self._explained():
                self.folder.mkdir(parents=True, exist_ok=True)
            with self._whole("index.npy", self.remote.size("index.npy")):
                pass
        except MissingFileError as error:
            raise NoSetError(
                f"{error}: give the URL of a folder with train/ and test/, as `spresso prepare` makes it"
            ) from error
        with self._explained(), self._lock():
            write_whole(self.folder / "set.json", description)

    @contextmanager
    def open(self, name: str, size: int) -> Iterator[io.FileIO]:
        """A shard of so many bytes: fetched if it is not here, and kept here while it is open.

        Raises:
            MissingFileError: there is no such shard, or it is shorter.
            ValueError: it can't be had, or the cache can't hold it.
        """
        with self._whole(name, size) as file:
            os.utime(file.fileno())  # now the last to be evicted
            yield file

    @contextmanager
    def _whole(self, name: str, size: int) -> Iterator[io.FileIO]:
        path = self.folder / name
        while True:
            try:
                file = path.open("rb", buffering=0)
            except FileNotFoundError:
                if (fetched := self._fetched(path, size)) is None:
                    continue
                file = fetched
            with file:
                fcntl.flock(file, fcntl.LOCK_SH)
                if _exists(file):  # it may have been evicted before it was locked
                    yield file
                    return

    def _fetched(self, path: Path, size: int) -> io.FileIO | None:
        """Fetch a file. None: try anew, for another process did, or all that is here is in use."""
        with self._explained():
            if (part := self._part(path, size)) is None:
                time.sleep(_NO_ROOM)
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

    def _part(self, path: Path, size: int) -> io.FileIO | None:
        """Where to fetch a file to, with room for all of it."""
        part = path.with_name(f"{path.name}.{size}.part")
        with self._lock():
            if part.exists() or path.suffix != ".tar" or self._make_room(size):
                return io.FileIO(part, "ab+")
        return None

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes fit, now that what was unused for longest is gone."""
        if size > self.settings.limit:
            raise ValueError(
                f"a shard of {self.url} has {size / 2**20:.0f} MiB, more than data.cache.gib={self.settings.gib:g}: "
                f"raise that"
            )
        files = [(path, path.stat()) for kind in ("*.tar", "*.tar.*.part") for path in self._all_sets.glob(f"*/{kind}")]
        sizes = {path: _bytes_for(path, status) for path, status in files}
        total = sum(sizes.values())
        for path, _ in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if total + size <= self.settings.limit:
                break
            if _remove_unless_used(path):
                total -= sizes[path]
        return total + size <= self.settings.limit

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self._all_sets / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """An OSError in here is one of the cache's disk."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"the cache {self._all_sets} can't be written: {error.strerror}; give another data.cache.folder, or a "
                f"lower data.cache.gib than {self.settings.gib:g}"
            ) from error


def _options(url: str) -> dict[str, Any]:
    if url.partition("://")[0] not in ("http", "https"):
        return {}
    from aiohttp import ClientTimeout

    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)}}


def _exists(file: io.FileIO) -> bool:
    return os.fstat(file.fileno()).st_nlink > 0


def _bytes_for(path: Path, status: os.stat_result) -> int:
    return int(path.name.split(".")[-2]) if path.suffix == ".part" else status.st_size


def _remove_unless_used(path: Path) -> bool:
    with path.open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
        return True
