"""A worker process that a supervisor forks, so that the worker need not import anything again.

A fork copies the thread that forks and no other, so that whatever lock another thread holds stays locked for ever in
the child; and CUDA does not work in the child of a process that has used it. `require_forkable` refuses both.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from launch.signals import SIGNALS
from launch.slurm.attempt import Note
from models.documents import parse_json, to_json

_PR_SET_PDEATHSIG = 1
_CUDA = "/dev/nvidia-uvm"  # the device that CUDA opens first, and that asking for the number of GPUs leaves alone
_LARGEST = 60_000  # bytes of a note, which a pipe holds although nobody reads it yet

Tell = Callable[[Mapping[str, Any]], object]


class Forked:
    """A child process, which its parent may end at any time and which dies with its parent."""

    def __init__(self, pid: int, reader: int) -> None:
        self.pid = pid
        self._reader = reader
        self.killed = False
        """Whether `kill` was called before the process had ended."""

    def poll(self) -> int | None:
        """Return the exit status of the process, -N if signal N killed it; None if it has not ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        with suppress(ProcessLookupError):  # `poll` may have waited for it just now: handlers of signals call this
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.killed = True
        self.signal(signal.SIGKILL)

    def said(self) -> Note | None:
        """Return the note that the process told before it ended; None if it ended without a word. Called once."""
        os.set_blocking(self._reader, False)  # a process that it has started may still hold the other end
        with os.fdopen(self._reader, "rb") as file:
            line = file.readline(_LARGEST + 1)
        try:
            return parse_json(line, Note, "the note of a worker", mend="") if line else None
        except ValueError:  # it was killed while it wrote
            return None


def fork(work: Callable[[Tell], NoReturn], *, close: Collection[int]) -> Forked:
    """Fork a process that does `work`, which gets a function that tells the parent its note.

    The child begins with all signals of `launch.signals` blocked, so that none is lost before it has its handlers.

    Args:
        work: ends its process.
        close: descriptors that are the parent's alone.
    """
    require_forkable()
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # the child's collections would copy each page that they touch
    reader, writer = os.pipe()
    parent, before = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    pid = os.fork()
    if pid == 0:
        try:
            _become_worker(parent, [reader, *close])
            work(lambda note: _tell(writer, note))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.close(writer)
    return Forked(pid, reader)


def require_forkable() -> None:
    """Raise RuntimeError if this process runs a second thread, or has used CUDA."""
    if names := other_threads():
        raise RuntimeError(f"this process has other threads: {', '.join(names)}")
    torch = sys.modules.get("torch")
    if (torch is not None and torch.cuda.is_initialized()) or _CUDA in open_files():
        raise RuntimeError("this process has used CUDA")


def other_threads() -> list[str]:
    """Return the names of this process's other threads, those of libraries in C included."""
    found = []
    for path in Path("/proc/self/task").glob("[0-9]*/comm"):
        if path.parent.name != str(threading.get_native_id()):
            try:
                found.append(path.read_text().strip())
            except OSError:  # it has ended
                continue
    return found


def open_files() -> set[str]:
    """Return the paths of this process's open files and devices."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # it is closed again
            found.add(str(path.readlink()))
    return found


def _become_worker(parent: int, close: Collection[int]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor in close:
        os.close(descriptor)


def _tell(writer: int, note: Mapping[str, Any]) -> None:
    shortened = {key: value[:2000] if isinstance(value, str) else value for key, value in note.items()}
    line = to_json(shortened).encode() + b"\n"
    if len(line) <= _LARGEST:
        os.write(writer, line)
