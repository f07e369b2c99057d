"""The process beside rank 0 that uploads: `python -m trainer.stores.upload_process`, which `uploads` starts.

It is a process of its own so that no upload takes the interpreter's lock from a training step. Both sides exchange
lines of JSON. The first line that the process reads is its job; each further one asks for something and has a number,
which the process sends back once the request is done or has been replaced by a newer one. At the end of its input,
which also the death of rank 0 brings, it ends at once: whatever it was sending is not whole on the store yet.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from models.documents import write_json
from trainer.checkpoints.retention import Retention
from trainer.run_documents import UPLOAD
from trainer.stores.layout import Claim
from trainer.stores.store import Store
from trainer.stores.upload import RefusedError, Upload, is_gone
from trainer.urls import without_credentials

_LONGEST_PAUSE = 60.0  # seconds between two tries
_SAME_WARNING = 600.0  # seconds until the same warning is given again
_TELL_EVERY = 1.0  # seconds between two reports on how far an upload is
_NICE = 10  # how far the process steps back behind the training
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
"""Signals that ask the training to leave: rank 0 then ends the uploads itself."""


@dataclass(frozen=True)
class Request:
    """Something to do: claim the URL, upload a checkpoint or the export, or delete what is later than a checkpoint."""

    number: int
    kind: str
    """begin, checkpoint, went_back or export."""
    name: str = ""
    """The checkpoint's."""


class Inbox:
    """The requests that wait: of several checkpoints only the newest does."""

    def __init__(self, answer: Callable[[Request], None]) -> None:
        """`answer` is called with each request that is dropped."""
        self._waiting: list[Request] = []
        self._changed = threading.Condition()
        self._answer = answer

    def put(self, request: Request) -> None:
        """Add a request, and drop those that it makes needless."""
        with self._changed:
            dropped = [other for other in self._waiting if other.kind == "checkpoint" == request.kind]
            self._waiting = [*(other for other in self._waiting if other not in dropped), request]
            self._changed.notify()
        for other in dropped:
            self._answer(other)

    def take(self) -> Request:
        """Wait for a request and return it."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            return self._waiting.pop(0)

    def pause(self, seconds: float) -> bool:
        """Wait for some seconds, or until a request waits; return whether one does."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._waiting), seconds)


class Worker:
    """Does one request after the other, each until it succeeds, is refused, or is overtaken by a newer one."""

    def __init__(self, upload: Upload, tell: Callable[..., None]) -> None:
        self.upload, self.tell = upload, tell
        self.inbox = Inbox(lambda request: tell(answered=request.number))
        self._state: dict[str, Any] = {"url": upload.store.url}
        self._told = self._warned = -_SAME_WARNING
        self._problem = ""
        self._far: dict[tuple[str, int], int] = {}
        """What a request sends, and its bytes → the most of them that had gone at any time. Only more is progress."""
        self._moves = False
        """Whether the last try made progress."""
        self._refused = False
        upload.moved = self._moved

    def serve(self) -> NoReturn:
        """Do requests until the process ends."""
        while True:
            request = self.inbox.take()
            if not self._refused:
                self._until_done(request)
            self.tell(answered=request.number)

    def _until_done(self, request: Request) -> None:
        pause = 1.0
        self._far.clear()
        self._write()
        while True:
            self._moves = False
            try:
                self._do(request)
                self._succeeded(request)
                return
            except RefusedError as error:
                self._refused = True
                self._failed(str(error))
                return
            except Exception as error:  # the errors of fsspec's backends share no base class
                if request.kind == "checkpoint" and is_gone(self.upload.folder, request.name):
                    return
                self._failed(f"{request.name or request.kind} is not uploaded yet: {_reason(error)}; it is tried again")
            if self._moves:
                pause = 1.0
            if self.inbox.pause(pause * random.uniform(0.5, 1.5)) and not self._moves and request.kind == "checkpoint":
                return  # the newer one is worth more, if this one does not move
            pause = min(_LONGEST_PAUSE, 2 * pause)

    def _do(self, request: Request) -> None:
        match request.kind:
            case "begin":
                self.upload.begin()
            case "checkpoint":
                self.upload.checkpoint(request.name)
            case "documents":
                self.upload.begin()
                self.upload.documents()
            case "went_back":
                self.upload.went_back(request.name)
            case "export":
                self.upload.export()

    def _moved(self, what: str, sent: int, of: int) -> None:
        """Report how far an upload is, now and then."""
        if sent > self._far.get((what, of), 0):  # what is whole there, or fails each time, has gone before
            self._far[what, of], self._moves = sent, True
        if (now := time.monotonic()) - self._told > _TELL_EVERY or sent == of:
            self._told = now
            self.tell(sending=what, sent=sent, of=of)
            self._write(sending=what, sent=sent, of=of)

    def _succeeded(self, request: Request) -> None:
        if self._problem:
            self.tell(info=f"{self.upload.store.url} takes uploads again")
        self._problem = ""
        if request.kind in ("checkpoint", "export"):
            self._state["whole"] = request.name or "export"
            self.tell(info=f"{request.name or 'the export'} is whole at {self.upload.store.url}/{self.upload.stage}")
        self._state.pop("problem", None)
        self._write()

    def _failed(self, problem: str) -> None:
        problem = without_credentials(" ".join(problem.split()))
        self._state["problem"] = problem
        self._write()
        if problem != self._problem or time.monotonic() - self._warned > _SAME_WARNING:
            self._problem, self._warned = problem, time.monotonic()
            self.tell(warning=f"{self.upload.store.url}: {problem}")

    def _write(self, **facts: Any) -> None:
        if damaged := sorted(self.upload.damaged):
            facts["damaged"] = damaged
        with suppress(OSError):  # the disk is full, which the next checkpoint tells
            write_json(self.upload.folder / UPLOAD, {**self._state, "time": time.time(), **facts}, durable=False)


def _reason(error: BaseException) -> str:
    """Return an error in one line, the store's own rather than ours around it."""
    while error.__cause__ is not None and isinstance(error, ValueError):
        error = error.__cause__
    return f"{type(error).__name__}: {error}".strip(": ")


def make_worker(job: Mapping[str, Any], tell: Callable[..., None]) -> Worker:
    """Return the worker for a job, which `uploads.Uploads` writes."""
    upload = Upload(
        Store(job["url"], patience=0),
        Path(job["folder"]),
        Claim(**job["claim"]),
        job["config"],
        Retention(**job["retention"]),
        begins=job["begins"],
        damaged=set(job["damaged"]),
    )
    return Worker(upload, tell)


def main() -> None:
    """Read a job and requests from standard input; does not return."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    logging.disable()  # what a package logs at each try would fill the log; `Worker` says what failed
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints is no line for rank 0
    turn = threading.Lock()

    def tell(**facts: Any) -> None:
        with turn:
            print(json.dumps(facts), file=told, flush=True)

    worker = make_worker(json.loads(sys.stdin.readline()), tell)
    threading.Thread(target=_listen, args=(worker.inbox,), daemon=True).start()
    worker.serve()


def _listen(inbox: Inbox) -> NoReturn:
    for line in sys.stdin:
        inbox.put(Request(**json.loads(line)))
    os._exit(0)


if __name__ == "__main__":
    main()
