"""Messages between the supervisors of a job: lines of JSON over TCP. A message is never code."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any, Literal, NotRequired, TypedDict

from launch.slurm.roll_call import Ending
from models.documents import Natural, parse_json, to_json

_LONGEST = 65_536  # bytes of a line; more comes from a stranger
_HURRY = 5.0  # seconds in which the system must take a message


class Message(TypedDict):
    """What a supervisor tells the first one."""

    attempt: str
    """Token of the job's start, by which a stranger's connection is told."""
    rank: Natural
    ending: NotRequired[Ending]


class Command(TypedDict):
    """What the first supervisor tells the others."""

    do: Literal["end", "begin", "over"]
    """End the worker; begin another one; end the task, because the batch script decides what becomes of the job."""
    generation: Natural
    port: NotRequired[Natural]
    """MASTER_PORT of the ranks that begin."""
    grace: NotRequired[float]
    """Seconds that a worker gets to end by itself."""


class Channel:
    """One end of a connection."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(_HURRY)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rank: int | None = None
        """The rank at the other end, once it has said so."""
        self._held = b""

    def send(self, message: Any) -> bool:
        """Send a message; return whether the connection stands."""
        with suppress(OSError):
            self.socket.sendall(to_json(message).encode() + b"\n")
            return True
        return False

    def receive(self, kind: Any) -> list[Any] | None:
        """Return the whole messages that have arrived, all of type `kind`; None if the connection is closed."""
        try:
            received = self.socket.recv(_LONGEST, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._held = (self._held + received).split(b"\n")
        if not received or len(self._held) > _LONGEST:
            return None
        try:
            return [parse_json(line, kind, "a supervisor's message", mend="") for line in lines]
        except ValueError:
            return None

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()
