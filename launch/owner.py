"""Ownership of a directory. One process or job owns it; a new one takes over from an owner that is dead.

`owner.json` names the owner of a trained stage's directory. A rank calls `require` before it writes. If SLURM has
restarted a job while ranks of the earlier start still run on a disconnected node, these ranks find that the directory
has another owner, and end.

Everything else that writes into a directory (a whole run, `synth`, `prepare`, `evaluate`, `page`) owns it through
`holding`, with a hidden record.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import BinaryIO

from launch import record_lock, this_process
from launch.slurm import scheduler
from launch.slurm.attempt import TOKEN, Attempt
from models.atomic_write import replacing
from models.documents import DamagedDocument, Moment, Natural, Positive, damaged, read_json, to_json

_FILE = "owner.json"
_TURN = ".owner.lock"
_SILENCE = 900.0  # seconds without a sign of life after which an owner that can't be looked at counts as dead
_BEAT = 60.0  # seconds between two signs of life
_SETTLING = 1.0  # seconds after which all machines see who wrote last, on a file system without locks
_SHOWN = 160  # characters of a command line in a message; the record has them all
_RETRY = 1.0  # seconds between two looks at an owner that is waited for

logger = logging.getLogger(__name__)

_locked: dict[Path, BinaryIO] = {}
"""Open record of each directory that this process owns; the lock on a record lasts until the file is closed."""
os.register_at_fork(after_in_child=lambda: [file.close() for file in _locked.values()])


class Superseded(ValueError):
    """Another start of the run has taken over."""


class _InUse(ValueError):
    """A living process or job owns the directory."""


@dataclass(frozen=True)
class Owner:
    """Owner of a directory. Records of release 0.1.0 have no field after `restart`."""

    token: str
    host: str
    pid: Positive
    born: str
    """Start time of the process in kernel ticks, which tells it from a later process with the same pid."""
    job: str = ""
    """SLURM's job id, if the job's script has taken the directory for all ranks; else empty."""
    restart: Natural = 0
    boot: str = ""
    """Boot of the machine in which the process runs; a pid of another boot says nothing."""
    pids: str = ""
    """Namespace of the pid; the same pid in another container is another process."""
    locked: bool = False
    """Whether the process holds the lock of its record for as long as it lives."""
    began: Moment = 0.0
    """When the owner took the directory, in seconds since the epoch."""
    command: str = ""
    """Command line of the process."""
    launch: str = ""
    """The SLURM job or torchrun that started the process, if any; `restart` counts its starts."""

    @property
    def unattended(self) -> bool:
        """Whether a job or a launcher has started the process, which no person watches."""
        return bool(self.job or self.launch)

    @property
    def told(self) -> str:
        """Name of the owner, for people."""
        return f"job {self.job}" if self.job else f"process {self.pid} on {self.host}"

    @property
    def details(self) -> str:
        """When and with which command the owner began, in brackets; empty if the record does not say."""
        if not self.began:
            return ""
        since = datetime.fromtimestamp(self.began).astimezone().isoformat(" ", "seconds")
        command = self.command if len(self.command) <= _SHOWN else f"{self.command[:_SHOWN]}…"
        return f" (since {since}, `{command}`)"

    @property
    def how_to_end(self) -> str:
        """The command that ends the owner, after an "or end it"."""
        if self.job:
            return f" with `scancel {self.job}`"
        if not self.boot or self.boot != this_process.boot():
            return ""
        return f" with `kill {self.pid}`" if self.pids == this_process.pid_namespace() else " in its container"


def by_hand() -> Owner:
    """Return this process as an owner."""
    host, pid, boot, pids = socket.gethostname(), os.getpid(), this_process.boot(), this_process.pid_namespace()
    born = this_process.born(pid)
    launch, restart = this_process.launch()
    return Owner(
        "_".join([host, str(pid), born, boot, pids]),
        host,
        pid,
        born,
        restart=restart,
        boot=boot,
        pids=pids,
        began=time.time(),
        command=this_process.command(),
        launch=launch,
    )


def by_job(attempt: Attempt) -> Owner:
    """Return a start of a job as an owner."""
    return Owner(attempt.token, socket.gethostname(), os.getpid(), "", attempt.job, attempt.restart)


def take(folder: Path, owner: Owner) -> None:
    """Make `owner` the owner of a trained stage's directory, for this process and its children.

    Raises:
        ValueError: a living process or job owns the directory, or its record is damaged and a person is there to say
            whether one does.
    """
    _take(folder, owner, _FILE, lambda name: name == _FILE)
    os.environ[TOKEN] = owner.token


def _take(folder: Path, owner: Owner, name: str, is_rival: Callable[[str], bool]) -> None:
    """Write the record `name`, unless a living owner has one that is a rival."""
    folder.mkdir(parents=True, exist_ok=True)
    with record_lock.turn(folder / _TURN):
        for path in sorted(folder.iterdir()):
            if is_rival(path.name):
                _require_free(path, owner)
        locked = _write(folder / name, owner)
    if not locked and not owner.job:
        # Without locks, two may have written at once. The last one is the owner.
        time.sleep(_SETTLING)
        held = _read(folder / name)
        if held is None or held.token != owner.token:
            raise _in_use(folder, held)


def _require_free(record: Path, newcomer: Owner) -> None:
    try:
        held = _read(record)
    except DamagedDocument as error:
        if not newcomer.unattended:
            raise
        _set_aside(record, error)
        return
    if held is not None and not _same(held, newcomer) and _lives(held, record):
        raise _in_use(record.parent, held)


def _set_aside(record: Path, error: DamagedDocument) -> None:
    """Rename a damaged record, which names no owner. One that lives all the same ends at its next `require`."""
    kept = record.rename(record.with_name(f"{record.name}.{secrets.token_hex(4)}.damaged"))
    logger.warning("%s is damaged and counts as none: it is kept as %s", record, kept.name)


def _in_use(folder: Path, held: Owner | None) -> _InUse:
    if held is None:
        return _InUse(f"{folder} is in use by an unknown owner: repeat the command")
    return _InUse(
        f"{folder} is in use by {held.told}, which is alive{held.details}: wait for it, or end it{held.how_to_end}"
    )


def _write(record: Path, owner: Owner) -> bool:
    """Replace a record; return whether this process holds its lock, which it does only for itself."""
    mine = owner.pid == os.getpid() and not owner.job and owner.token == by_hand().token
    _unlock(record)
    with replacing(record) as partial:
        file = partial.open("wb")
        locked = mine and record_lock.lock(file)
        file.write(to_json(replace(owner, locked=locked), indent=1).encode())
        file.flush()
    if locked:
        _locked[record.absolute()] = file
    else:
        file.close()
    return locked


def _unlock(record: Path) -> None:
    if file := _locked.pop(record.absolute(), None):
        file.close()


def holder(folder: Path) -> Owner | None:
    """Return the owner of a trained stage's directory; None if it has none. Raises ValueError if it is damaged."""
    return _read(folder / _FILE)


def _read(record: Path) -> Owner | None:
    mend = "remove it if nothing trains there or writes there"
    try:
        held = read_json(record, Owner, mend=mend)
    except FileNotFoundError:
        return None
    if held.job and held.token != f"{held.job}_{held.restart}":
        raise damaged(record, "`token` does not name the job and its start", mend)
    return held


def release(folder: Path, token: str) -> None:
    """Give up the ownership of a trained stage's directory, if the owner with this token still has it."""
    _release(folder / _FILE, token)


def _release(record: Path, token: str) -> None:
    try:
        held = _read(record)
    except (ValueError, OSError) as error:  # the work is done all the same
        logger.warning("%s", error)
    else:
        if held is None or held.token != token:
            return
        record.unlink(missing_ok=True)
    _unlock(record)


def require(folder: Path) -> None:
    """Raise Superseded if the start that this process belongs to no longer owns the directory.

    A damaged record names no other start, so that it ends no training. The next start replaces it.
    """
    try:
        held = holder(folder)
    except DamagedDocument as error:
        logger.warning("%s", error)
        return
    if held is None or held.token != os.environ.get(TOKEN):
        raise Superseded(f"{folder} was taken over by {held.told if held else 'an unknown owner'}: this rank ends")


@contextmanager
def training(folder: Path) -> Iterator[None]:
    """Own a trained stage's directory within the block. Raises ValueError as `take` does."""
    owner = by_hand()
    take(folder, owner)
    try:
        yield
    finally:
        os.environ.pop(TOKEN, None)
        release(folder, owner.token)


@contextmanager
def holding(
    folder: Path, *, part: int = 0, parts: int = 1, wait: Callable[[str], object] | None = None
) -> Iterator[Callable[[], None]]:
    """Own a directory within the block, or one part of the work in it; the other parts may have other owners.

    Yields a function that raises ValueError if another part has a living owner.

    Args:
        folder: the directory, which is made if it is missing.
        part: the part of the work, 0 … parts - 1.
        parts: the number of parts. A process with another number of parts would do the same work again.
        wait: called once with a line if the directory is in use, which is then waited for; None: it is an error.

    Raises:
        ValueError: a living process owns the directory, or the part.
    """
    owner, siblings = by_hand(), f"-of-{parts}.json"
    name = ".owner.json" if parts == 1 else f".owner-{part}{siblings}"

    def is_rival(other: str) -> bool:
        return _is_record(other) and (other == name or parts == 1 or not other.endswith(siblings))

    while True:
        try:
            _take(folder, owner, name, is_rival)
            break
        except _InUse as error:
            if wait is None:
                raise
            wait(str(error).partition(": wait for it")[0])
            wait = _quiet
            time.sleep(_RETRY)
    over = Event()
    Thread(target=_beat, args=(folder / name, over), daemon=True).start()
    try:
        yield lambda: _require_alone(folder, owner)
    finally:
        over.set()
        _release(folder / name, owner.token)


def at_work(folder: Path) -> Owner | None:
    """Return the living owner of a directory that `holding` gave it; None if there is none, or it can't be read."""
    record = folder / ".owner.json"
    try:
        held = _read(record)
    except (ValueError, OSError):
        return None
    return held if held is not None and _lives(held, record) else None


def _is_record(name: str) -> bool:
    return name.startswith(".owner") and name.endswith(".json")


def _require_alone(folder: Path, owner: Owner) -> None:
    for path in sorted(folder.iterdir()):
        if _is_record(path.name):
            _require_free(path, owner)


def _quiet(line: str) -> None:
    pass


def _beat(record: Path, over: Event) -> None:
    """Give a sign of life now and then: other machines may have nothing else to judge by."""
    while not over.wait(_BEAT):
        file = _locked.get(record.absolute())
        try:
            os.utime(record if file is None else file.fileno())
        except OSError:  # the record was replaced, or the file system does not answer
            continue


def _same(held: Owner, newcomer: Owner) -> bool:
    """Whether the owner is the newcomer itself, or an earlier start of the newcomer's job."""
    one_job = bool(held.job) and held.job == newcomer.job
    one_launch = bool(held.launch) and held.launch == newcomer.launch
    return held.token == newcomer.token or ((one_job or one_launch) and held.restart < newcomer.restart)


def lives(held: Owner, folder: Path) -> bool:
    """Whether the owner of a trained stage's directory is alive. If that cannot be checked, recent writing decides."""
    return _lives(held, folder / _FILE)


def _lives(held: Owner, record: Path) -> bool:
    if held.job:
        return _job_lives(held.job, otherwise=lambda: _wrote_recently(record))
    if held.locked and record_lock.is_locked(record):
        return True
    if held.boot == this_process.boot() if held.boot else held.host == socket.gethostname():
        if held.locked:  # one kernel has one table of locks, whatever the container
            return False
        if held.pids in ("", this_process.pid_namespace()):
            return this_process.born(held.pid) == held.born
        return _wrote_recently(record)
    if held.host == socket.gethostname() and _last_written(record) < this_process.booted_at():
        return False  # the machine was restarted
    kind, _, number = held.launch.rpartition(" ")
    if kind == "SLURM job" and not _job_lives(number, otherwise=lambda: True):
        return False
    return _wrote_recently(record)


def _job_lives(job: str, *, otherwise: Callable[[], bool]) -> bool:
    try:
        return bool(scheduler.alive([job]))
    except scheduler.QueueError:  # there is no SLURM on this machine, or no answer
        return otherwise()


def _wrote_recently(record: Path) -> bool:
    return time.time() - _last_written(record) < _SILENCE


def _last_written(record: Path) -> float:
    """Return when the owner gave its last sign of life, in seconds since the epoch; 0 if it gave none."""
    paths = (record.with_name("status.json"), record)
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)
