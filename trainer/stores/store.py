"""A store: a folder at a URL that fsspec writes to, such as `s3://bucket/prefix`.

Reading is that of `trainer.data.remote`. A write is one try, which raises what the store's package raises: the one who
uploads decides whether to try again, because something newer may have come meanwhile.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from fsspec.callbacks import Callback

from models.atomic_write import write_whole
from trainer.data.remote import Remote
from trainer.file_names import printable
from trainer.stores.protocols import WITH_FOLDERS
from trainer.urls import without_credentials

_PIECE = 16 << 20  # bytes of a part of a file that an object store takes in parts
_STREAMS = 4  # parts at once; each is in memory
_MOST_PARTS = 9_000  # S3 takes 10,000
_PARTS = {"s3": {"max_concurrency": _STREAMS}, "s3a": {"max_concurrency": _STREAMS}, "gs": {}, "gcs": {}}
"""Protocols whose `put_file` takes a `chunksize`, and its further options."""


class SentWrongError(OSError):
    """What arrived at the store is not what was sent."""


class Store(Remote):
    """Reads, writes, lists and deletes files below a URL.

    Attributes:
        md5_tags: whether the store's ETags were seen to be MD5 sums, as those of S3 are unless a key encrypts them.
    """

    def __init__(self, url: str, *, patience: float) -> None:
        super().__init__(url, patience=patience)
        self.protocol = self.url.partition("://")[0].lower()
        self.md5_tags = False
        self._made: set[str] = set()

    def content(self, name: str, *, most: int) -> bytes:
        """See `Remote`; what was known of the file's size before counts for nothing."""
        self._filesystem.invalidate_cache()
        return super().content(name, most=most)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return what `list` returns, after as many tries as `patience` allows. Raises as `Remote.append` does."""
        return self._retry(folder or ".", lambda: self.list(folder))

    def list(self, folder: str = "") -> dict[str, int]:
        """Return the bytes of each file directly in a folder; a folder in it has -1. Empty if there is no such folder.

        Hidden files directly below the URL are left out: probes of `trouble`, which stay where deleting is denied, and
        what a process that was killed was writing.

        Raises what the store's package raises.
        """
        self._filesystem.invalidate_cache()
        path = self._path(folder).rstrip("/")
        found = {}
        try:
            entries = self._filesystem.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        for entry in entries:
            name = str(entry["name"]).rstrip("/")
            last = name.rpartition("/")[2]
            if name.lstrip("/") == path.lstrip("/") or (not folder and last.startswith(".")):
                continue  # an object store may hold an empty object for the folder
            found[last] = -1 if entry["type"] == "directory" else int(entry["size"] or 0)
        return found

    def has_bucket(self) -> bool:
        """Whether the URL's bucket is there and may be listed; a missing one lists like an empty folder."""
        bucket = self._path("").strip("/").partition("/")[0]
        return self.protocol in WITH_FOLDERS or bool(self._filesystem.exists(bucket))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file; raises SentWrongError, and what the store's package raises."""
        self._make_folder(name)
        if self.protocol in ("file", "local"):  # object stores and WebDAV show a file once it is whole
            write_whole(Path(self._path(name)), content)
        else:
            self._filesystem.pipe_file(self._path(name), content)
        tag = self._require_size(name, len(content))
        self.md5_tags = self.md5_tags or tag == _md5([content])[0]

    def send(self, name: str, path: Path, moved: Callable[[int], None] = lambda count: None) -> None:
        """Upload a file of any size; `moved` is told how many more bytes have gone. Raises as `write` does."""
        self._make_folder(name)
        size = path.stat().st_size
        piece = _piece_of(size)
        options = {"chunksize": piece, **_PARTS[self.protocol]} if self.protocol in _PARTS else {}
        self._filesystem.put_file(str(path), self._path(name), callback=_Moved(moved), **options)
        tag = self._require_size(name, size)
        if self.md5_tags and not self._is_tag_of(path, tag, piece):
            raise SentWrongError(f"{self._named(name)} arrived with another checksum than it was sent with")

    def holds(self, name: str, path: Path) -> bool:
        """Whether a file that is there in the right size also has the right checksum, as far as the store tells it."""
        size = path.stat().st_size
        tag = self._require_size(name, size)
        return not self.md5_tags or self._is_tag_of(path, tag, _piece_of(size))

    def _is_tag_of(self, path: Path, tag: str, piece: int) -> bool:
        """Whether an ETag is a file's: its MD5 sum, or the sum of its parts' and how many parts there are."""
        whole, _, parts = tag.partition("-")
        if parts and int(parts) != -(-path.stat().st_size // piece):
            return True  # parts of another size, of which nothing can be told
        with path.open("rb") as file:
            sums = _md5(iter(lambda: file.read(piece), b""), each=bool(parts))
        return whole == (
            hashlib.md5(bytes.fromhex("".join(sums)), usedforsecurity=False).hexdigest() if parts else sums[0]
        )

    def _require_size(self, name: str, size: int) -> str:
        """Return a file's ETag, empty if it has none; raise SentWrongError unless it has `size` bytes."""
        self._filesystem.invalidate_cache()
        facts = self._filesystem.info(self._path(name))
        if facts["size"] != size:
            raise SentWrongError(f"{self._named(name)} has {facts['size']} bytes, not the {size} that were sent")
        return str(facts.get("ETag") or "").strip('"')

    def remove(self, name: str) -> None:
        """Delete a file, if it is there; raises what the store's package raises."""
        with suppress(FileNotFoundError):
            self._filesystem.rm_file(self._path(name))

    def remove_folder(self, folder: str, *, first: str) -> None:
        """Delete a folder and the files in it; the file `first`, which makes it whole, goes before the rest."""
        names = self.list(folder)
        for name in sorted(names, key=lambda name: name != first):
            self.remove(f"{folder}/{name}")
        if self.protocol in WITH_FOLDERS and names:
            self._remove_empty(folder)

    def _remove_empty(self, folder: str) -> None:
        self._made.discard(folder)
        path = self._path(folder)
        if self.protocol in ("webdav", "dav"):  # nginx wants the slash, which webdav4 takes away
            self._filesystem.client.request("DELETE", path, add_trailing_slash=True)
        else:
            self._filesystem.rmdir(path)

    def _make_folder(self, name: str) -> None:
        folder = name.rpartition("/")[0]
        if self.protocol in WITH_FOLDERS and folder not in self._made:
            self._filesystem.makedirs(self._path(folder).rstrip("/"), exist_ok=True)
            self._made.add(folder)


def trouble(url: str) -> str:
    """Return why nothing can be written below a URL, with the mend; empty if it can. Writes a file, and deletes it."""
    name = f".probe_{secrets.token_hex(4)}"
    try:
        store = Store(url, patience=0)
        store.write(name, b"spresso")
        store.remove(name)
    except Exception as error:  # the packages' errors share no base class
        reason = without_credentials(printable(f"{type(error).__name__}: {error}".partition("\n")[0]))
        return (
            f"checkpoint.upload={url} can't be written: {reason}. Check the bucket's name, and the store's credentials "
            f"and endpoint in its own environment or configuration (docs/checkpoints.md), or remove checkpoint.upload"
        )
    return ""


def _piece_of(size: int) -> int:
    """Return the bytes of a part of a file of `size` bytes, of which an object store takes a bounded number."""
    return max(_PIECE, -(-size // _MOST_PARTS))


def _md5(pieces: Iterable[bytes], *, each: bool = False) -> list[str]:
    """Return the MD5 sum in hex of all pieces together, or of each."""
    sums, total = [], hashlib.md5(usedforsecurity=False)
    for piece in pieces:
        if each:
            sums.append(hashlib.md5(piece, usedforsecurity=False).hexdigest())
        else:
            total.update(piece)
    return sums if each else [total.hexdigest()]


class _Moved(Callback):
    """Tells how many more bytes have gone."""

    def __init__(self, moved: Callable[[int], None]) -> None:
        super().__init__()
        self.moved = moved

    def relative_update(self, inc: int = 1) -> None:
        """See fsspec's `Callback`."""
        self.moved(inc)
