"""Servers that send too much, for ever, or other things than they said are refused in a line, at a small cost."""

from __future__ import annotations

import functools
import gzip
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.damage import watched
from tests.trainer.data.test_remote import write_set
from trainer.data import remote as remote_sets
from trainer.data.remote import CacheSettings
from trainer.data.shard_set import open_set

LIMIT = 400_000  # bytes
MOST_SECONDS = 12


@functools.cache
def bomb() -> bytes:
    """Return 200 MiB of spaces, compressed."""
    return gzip.compress(b" " * (200 << 20), 1)


class Hostile(BaseHTTPRequestHandler):
    """Serves a set, but for what `wrongly` says of one of its files."""

    protocol_version = "HTTP/1.1"
    folder: Path
    wrongly: dict[str, str]

    def log_message(self, *unused: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        name = self.path.rpartition("/")[2]
        path, way = self.folder / name, self.wrongly.get(name, "")
        if not path.exists():
            self.send_error(404)
            return
        content = path.read_bytes()
        if way in ("endless", "dripping"):
            self.send_response(200)
            self.send_header("Content-Length", str(2**40) if body or name == "set.json" else str(len(content)))
            self.end_headers()
            while body:
                self.wfile.write(b" " * (1 << 16) if way == "endless" else b" ")
                time.sleep(0.3 if way == "dripping" else 0)
            return
        if way == "a bomb":
            content = bomb()
        first, last, status = 0, len(content) - 1, 200
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes=") and way not in ("a bomb", "longer"):
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            last, status = min(last, len(content) - 1), 206
        if way == "longer":
            content = content + b"x" * 1_000_000
            last = len(content) - 1
        size = 3 << 30 if way == "a lie" else last - first + 1
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(size if not body or way == "a lie" else last - first + 1))
        if way == "a bomb":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if body:
            self.wfile.write(content[first : last + 1])


@contextmanager
def served(folder: Path, **wrongly: str) -> Iterator[str]:
    handler = type("Handler", (Hostile,), {"folder": folder, "wrongly": wrongly})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *unused: None  # clients that have had enough
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def data(tmp_path) -> Path:
    write_set(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> CacheSettings:
    monkeypatch.setattr(remote_sets, "_HTTP_TIMEOUT", 1.0)
    return CacheSettings(str(tmp_path / "cache"), gib=LIMIT / 2**30, patience=2)


def written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_all(url: str, cache: CacheSettings) -> None:
    remote = open_set(url, cache)
    for shard in range(len(remote.shards)):
        remote.fetch(shard)


def test_a_friendly_server_serves_all(data, cache):
    with served(data) as url:
        read_all(url, cache)
    assert written(cache.path) <= LIMIT + 200_000


@pytest.mark.parametrize(
    ("name", "way", "said"),
    [
        *(("set.json", way, "set.json is longer than it may be") for way in ("endless", "a bomb")),
        *((name, "dripping", "could not be fetched for 2 s") for name in ("set.json", "index.npy", "00000.tar")),
        ("index.npy", "a lie", "index.npy has 3221225472 bytes, too many for 600 samples"),
        ("index.npy", "longer", "too many for 600 samples"),
        ("00000.tar", "endless", "00000.tar is longer than it may be"),
        ("00000.tar", "longer", "00000.tar is longer than it may be"),
        ("00000.tar", "a bomb", "00000.tar is longer than it may be"),
    ],
)
def test_a_hostile_server_is_refused_at_a_small_cost(data, cache, name, way, said, mutant_counts):
    mutant_counts.begin("servers")
    bomb()
    start = time.monotonic()
    with served(data, **{name: way}) as url, pytest.raises(ValueError, match=said), watched():
        read_all(url, cache)
    assert time.monotonic() - start < MOST_SECONDS
    assert written(cache.path) < LIMIT + 200_000
    mutant_counts.end("servers", refused=True)


def lying(description: dict[str, Any], chance: random.Random) -> None:
    """Let a description say something else of the set's shards or size."""
    shard = chance.choice(description["shards"])
    way = chance.randrange(5)
    if way == 0:
        shard["name"] = chance.choice(
            ("a", "index.npy", "set.json", "lock", "00000.tar.5.part", "x.zip", "../a.tar", "/a.tar")
        )
    elif way == 1:
        shard["bytes"] = chance.choice((0, 1, 10**6, 2**40, 2**52, shard["bytes"] + 1))
    elif way == 2:
        description["samples"] = chance.choice((0, 1, 10**6, 2**52))
    elif way == 3:
        description["shards"] = description["shards"][: chance.randrange(len(description["shards"]))]
    else:
        del description["shards"][chance.randrange(len(description["shards"]))]


def test_descriptions_that_lie_are_refused_at_a_small_cost(data, cache, mutant_counts):
    whole = (data / "set.json").read_text()
    with served(data) as url:
        for seed in range(40):
            description = json.loads(whole)
            lying(description, random.Random(seed))
            (data / "set.json").write_text(json.dumps(description))
            mutant_counts.begin("servers")
            with pytest.raises(ValueError, match=url), watched():
                read_all(url, cache)
            assert written(cache.path) < LIMIT + 200_000 + 30_000 * (seed + 1)  # an index and a description each
            mutant_counts.end("servers", refused=True)
