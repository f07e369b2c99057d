"""A disk that fails: calls that read below a folder raise an error of the system, in Python's own reads and opens."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Function = Callable[..., Any]
BY_PATH, BY_DESCRIPTOR = ("open", "stat", "lstat", "scandir"), ("read", "readv", "pread", "preadv")


class FailingDisk:
    """Counts the calls that read below `folder`, and lets `times` of them fail from the call number `first` on."""

    def __init__(self, folder: Path, number: int, *, first: int, times: float) -> None:
        self.folder, self.number, self.first, self.times = os.path.realpath(folder), number, first, times
        self.calls = 0
        self.failed: list[str] = []

    def ask(self, call: str, path: object) -> None:
        """Count a call, and raise OSError if it is one that fails."""
        if not isinstance(path, str | os.PathLike):
            return
        name = os.fspath(path)
        if not isinstance(name, str) or not str(Path(name).absolute()).startswith(self.folder):
            return
        self.calls += 1
        if 0 <= self.calls - 1 - self.first < self.times:
            self.failed.append(f"{call} {name}")
            raise OSError(self.number, os.strerror(self.number), name)


class _Raw(io.FileIO):
    """An unbuffered file of a failing disk."""

    def __init__(self, file: Any, disk: FailingDisk, **options: Any) -> None:
        super().__init__(file, "rb", **options)
        self._disk = disk

    def readinto(self, target: Any) -> int:
        self._disk.ask("readinto", path_of(self.fileno()))
        return super().readinto(target)

    def readall(self) -> bytes:
        self._disk.ask("readall", path_of(self.fileno()))
        return super().readall()

    def read(self, size: int | None = -1) -> bytes:
        self._disk.ask("read", path_of(self.fileno()))
        return super().read(-1 if size is None else size)


def path_of(descriptor: int) -> str:
    try:
        return _readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


_readlink, _io_open = os.readlink, io.open


@contextmanager
def failing(disk: FailingDisk) -> Iterator[None]:
    """Let the disk fail within the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name in BY_PATH:
            patch.setattr(os, name, _asking(name, getattr(os, name), disk, lambda path: path))
        for name in BY_DESCRIPTOR:
            patch.setattr(os, name, _asking(name, getattr(os, name), disk, path_of))
        for module in (io, builtins):
            patch.setattr(module, "open", lambda *arguments, **options: _open(disk, *arguments, **options))
        yield


def _asking(
    name: str, real: Callable[..., Any], disk: FailingDisk, find: Callable[[Any], object]
) -> Callable[..., Any]:
    def call(target: Any = ".", *arguments: Any, **options: Any) -> Any:
        disk.ask(name, find(target))
        return real(target, *arguments, **options)

    return call


def _open(
    disk: FailingDisk, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
    errors: str | None = None, newline: str | None = None, closefd: bool = True, opener: Any = None,
) -> Any:  # fmt: skip
    if set(mode) & set("wax+"):
        return _io_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    if not isinstance(file, int):
        disk.ask("open", file)
    raw = _Raw(file, disk, closefd=closefd, opener=opener)
    if buffering == 0:
        return raw
    buffered = io.BufferedReader(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)
