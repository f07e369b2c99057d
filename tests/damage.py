"""Damages documents at random, and watches what a reader does with them."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import yaml

SECONDS = 20
"""After these, a reader counts as one that hangs."""
MEMORY = 2**30
"""Bytes of address space that a reader may take in addition to what the process has."""
DEEP = 200_000
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 1.5, 2**31, 2**63, 10**30, 10**400, float("inf"), -float("inf"), float("nan")),
    *("", "x", "\0", "../../x", "é" * 50, "\ud800", "1", [], {}, [[]], [1, "a"], {"a": 1}, [None], ["x"] * 1000),
)


class Hang(BaseException):
    """A reader took too long. It is no `Exception`, so that no reader takes it for an error of its own."""


@contextmanager
def watched() -> Iterator[None]:
    """Raise Hang if the block takes too long, and let it fail with MemoryError if it takes too much memory."""

    def ring(*unused: object) -> None:
        raise Hang(f"it takes more than {SECONDS} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, limits = signal.signal(signal.SIGALRM, ring), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


class Folder:
    """A folder that is put back as it was, whatever readers have done in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.stamps = self._stamps()

    def _stamps(self) -> dict[Path, tuple[int, ...]]:
        found = {}
        for path in self.folder.rglob("*"):
            status = path.lstat()
            found[path] = (status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns * path.is_file())
        return found

    def restore(self) -> None:
        now = self._stamps()
        changed = [path for path in now.keys() | self.stamps if now.get(path) != self.stamps.get(path)]
        for path in sorted(changed, reverse=True):
            remove(path)
        for path in sorted(changed):
            if path in self.contents:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.contents[path])
            elif path in self.stamps:
                path.mkdir(parents=True, exist_ok=True)
        self.stamps = self._stamps()


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Document:
    """A document that is to be damaged. `dump` and `parse` know its format."""

    def __init__(self, path: Path) -> None:
        self.path, self.content = path, path.read_bytes()

    def parse(self) -> Any:
        return json.loads(self.content)

    def dump(self, value: Any) -> bytes:
        return json.dumps(value).encode()

    def damage(self, random: Random) -> str:
        """Damage the document in one way; return the way."""
        way = random.choice((*BYTES, *[way for way in VALUE for _ in range(3)], *FILE))
        remove(self.path)
        if way in FILE:
            FILE[way](self.path)
        elif way in BYTES:
            self.write(BYTES[way](self.content, random))
        else:
            value = VALUE[way](copy.deepcopy(self.parse()), random)
            self.write(self.dump(value))
            return f"{way}: {str(value)[:300]}"
        return way

    def write(self, content: bytes) -> None:
        self.path.write_bytes(content)


class LinesDocument(Document):
    """A document with one JSON value in each line."""

    def parse(self) -> Any:
        return [json.loads(line) for line in self.content.splitlines()]

    def dump(self, value: Any) -> bytes:
        lines = value if isinstance(value, list) else [value]
        return "".join(json.dumps(line) + "\n" for line in lines).encode()


class YamlDocument(Document):
    """A document in YAML."""

    def parse(self) -> Any:
        return yaml.safe_load(self.content)

    def dump(self, value: Any) -> bytes:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")


# --- ways to damage ---------------------------------------------------------------------------------------------------


def _flipped(content: bytes, random: Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(random.randint(1, 4)):
        damaged[random.randrange(len(damaged))] = random.randrange(256)
    return bytes(damaged)


def _put_in(what: bytes) -> Callable[[bytes, Random], bytes]:
    def put(content: bytes, random: Random) -> bytes:
        places = [place for place, byte in enumerate(content) if byte in b":,["] or [0]
        place = random.choice(places) + 1
        return content[:place] + what + content[place:]

    return put


BYTES: dict[str, Callable[[bytes, Random], bytes]] = {
    "flipped bytes": _flipped,
    "cut off": lambda content, random: content[: random.randrange(len(content))],
    "empty": lambda content, random: b"",
    "binary": lambda content, random: random.randbytes(2000),
    "text of another encoding": lambda content, random: content.decode().encode("utf-16"),
    "nested too deeply": lambda content, random: random.choice((b"[", b'{"a":', b"- ")) * DEEP,
    "a deep value": _put_in(b" [" * DEEP + b"]" * DEEP),
    "a number of many digits": _put_in(b" " + b"9" * 6000),
    "a number that is not finite": _put_in(b" NaN"),
    "a long text": lambda content, random: b'{"name": "' + b"a" * 2_000_000 + b'"}',
    "too large": lambda content, random: b" " * (40 << 20) + content,
    "aliases that multiply": lambda content, random: _bomb(),
}


def _bomb() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    return "\n".join(lines).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key or index) of every value in it."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += [(value, key), *_places(item)]
    return found


def _at_random(change: Callable[[Any, Any, Random], None]) -> Callable[[Any, Random], Any]:
    def changed(value: Any, random: Random) -> Any:
        for _ in range(random.choice((1, 1, 1, 2))):
            if places := _places(value):
                change(*random.choice(places), random)
        return value

    return changed


def _rename(holder: Any, key: Any, random: Random) -> None:
    if isinstance(holder, dict):
        holder[random.choice((key + "s", key[1:], key.upper(), "colour"))] = holder.pop(key)
    else:
        holder.insert(key, holder[key])


VALUE: dict[str, Callable[[Any, Random], Any]] = {
    "another value": _at_random(lambda holder, key, random: holder.__setitem__(key, random.choice(VALUES))),
    "a missing name": _at_random(lambda holder, key, random: holder.pop(key)),
    "another name": _at_random(_rename),
    "another whole": lambda value, random: random.choice(VALUES),
    "a foreign name": lambda value, random: {**value, "colour": "red"} if isinstance(value, dict) else [*value, "red"],
}
FILE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
}
