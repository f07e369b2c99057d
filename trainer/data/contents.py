"""Tells whether the files that a set was made of are still the same, wherever they lie and whenever they were copied.

The times of files change when a folder is copied. Sets are therefore recognized in two steps: by names, sizes and
times, which takes no reading; and if only these differ, by a hash of all bytes, which `prepare` makes while a file is
in the page cache. The second step reads every file, once: the new times are then kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models.disk_errors import patiently
from models.regular_file import open_regular
from trainer.data.sources import SoundFile

_THREADS = 8  # threads that read files; on a network file system they mostly wait


def content_digest(path: Path) -> str:
    """Return a hash of a file's bytes, in hex; empty if it is missing, or is no file that may be read.

    Raises:
        OSError: its disk failed, which an empty hash would hide from then on.
    """

    def read() -> str:
        with os.fdopen(open_regular(path), "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    try:
        return patiently(read)
    except ValueError:
        return ""


def content_digests(paths: Iterable[Path]) -> list[str]:
    """Return `content_digest` of each file."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(content_digest, paths))


def hash_sources(sources: Iterable[SoundFile], digests: Iterable[str]) -> str:
    """Return a hash of the names, bytes, captions and facts of sound files, in any order."""
    pairs = zip(sources, digests, strict=True)
    lines = [json.dumps([source.name, digest, source.caption, dict(source.facts)]) for source, digest in pairs]
    return hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=16).hexdigest()


def hash_files(folder: Path, paths: list[Path]) -> str:
    """Return a hash of the relative paths and bytes of files in a folder, in any order."""
    names = (path.relative_to(folder).as_posix() for path in paths)
    lines = [json.dumps(pair) for pair in zip(names, content_digests(paths), strict=True)]
    return hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=16).hexdigest()
