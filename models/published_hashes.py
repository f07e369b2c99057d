"""The hashes that the Hugging Face hub publishes of the files that were downloaded from it, and whether they hold.

The hub names a file by its SHA-256 if it is large, otherwise by git's hash. huggingface_hub keeps that name beside each
download: in its cache a file is a link to `blobs/HASH`, and a folder of `hf download --local-dir` has a line with it in
`.cache/huggingface/download/`. Both layouts are documented by huggingface_hub.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from models.documents import opened

_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_CHUNK = 1 << 22


def published_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield each file below a folder of which a hash was published, with the hash: SHA-256, or git's of 40 digits."""
    for path in sorted(folder.rglob("*")):
        if ".cache" not in path.relative_to(folder).parts and (expected := _published(folder, path)):
            yield path, expected


def holds(path: Path, expected: str) -> bool:
    """Whether a file has the content that a hash was published of. Raises OSError or ValueError if it can't be read."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256() if _SHA256.fullmatch(expected) else hashlib.sha1(b"blob %d\0" % size)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == expected


def _published(folder: Path, path: Path) -> str | None:
    if path.is_symlink():
        target = path.readlink()
        return _hash(target.name) if target.parent.name == "blobs" else None
    note = folder / ".cache/huggingface/download" / f"{path.relative_to(folder)}.metadata"
    if not path.is_file() or not note.is_file():
        return None
    with opened(note) as file:
        lines = file.read(4096).decode("utf-8", "replace").split("\n")
    return _hash(lines[1].strip()) if len(lines) > 1 else None


def _hash(text: str) -> str | None:
    return text if _SHA256.fullmatch(text) or _GIT.fullmatch(text) else None
