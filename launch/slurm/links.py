"""How the supervisors of a job agree on what becomes of their workers.

The first supervisor is the chair: all others keep a connection to it, tell it how their workers ended, and do what it
orders. If it is gone, or can't be reached, each supervisor ends its task with its worker, and the batch script decides.
"""

from __future__ import annotations

import math
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from launch.slurm.attempt import Attempt
from launch.slurm.channel import Channel, Command, Message
from launch.slurm.roll_call import BROKEN, Ending, RollCall

PATIENCE = 60.0
"""Seconds from a failure until all workers must have ended, and in which a supervisor must have reached the chair."""
_RETRY = 0.5  # seconds between two tries to reach the chair
_CONNECT = 1.0  # seconds for one try
_CROWD = 4096  # connections that may wait to be accepted

Restart = Callable[[RollCall], tuple[Attempt, int] | None]
"""Makes the next generation of ranks ready after a roll call, and returns its attempt and MASTER_PORT; None if the
batch script has to decide."""


class Link(Protocol):
    """This supervisor's part in the agreement."""

    orders: deque[Command]
    """Orders that have not been followed yet."""

    @property
    def stands(self) -> bool:
        """Whether orders may still come."""

    def tell(self, ending: Ending) -> bool:
        """Tell the chair how this supervisor's worker ended; return whether that is possible."""

    def tick(self) -> None:
        """Do what is due; called at least twice a second."""

    def descriptors(self) -> list[int]:
        """Return the open descriptors, which a worker must not keep."""

    def close(self) -> None:
        """Close all connections."""


class Chair:
    """The part of the first supervisor."""

    def __init__(
        self, selector: selectors.BaseSelector, attempt: Attempt, port: int, *, count: int, restart: Restart
    ) -> None:
        """Listen on a port. Raises OSError.

        Args:
            selector: calls the data of what is ready.
            attempt: that of the first workers.
            port: where the others find this supervisor.
            count: number of ranks.
            restart: see `Restart`.
        """
        self.orders: deque[Command] = deque()
        self._selector, self._name, self._restart = selector, attempt.token, restart
        self._roll, self._channels = RollCall(count, PATIENCE, attempt.generation), list[Channel]()
        self._order: Command | None = None
        self._listener = socket.create_server(("", port), backlog=_CROWD)
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def stands(self) -> bool:
        """Whether orders may still come."""
        return True

    def tell(self, ending: Ending) -> bool:
        """Count the end of the first supervisor's own worker."""
        self._count(ending)
        return True

    def tick(self) -> None:
        """Command a restart or the end, once the roll call has a result."""
        result = self._roll.result(time.monotonic())
        if result is None or (self._order is not None and self._order["do"] == "over"):
            return
        begun = None if result == BROKEN else self._restart(self._roll)
        if begun is None:
            self._give({"do": "over", "generation": self._roll.generation})
            return
        self._roll.next()
        self._give({"do": "begin", "generation": self._roll.generation, "port": begun[1]})

    def descriptors(self) -> list[int]:
        """Return the open descriptors, which a worker must not keep."""
        return [self._listener.fileno(), *(channel.socket.fileno() for channel in self._channels)]

    def close(self) -> None:
        """Close all connections."""
        self._listener.close()
        for channel in self._channels:
            channel.close()

    def _accept(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        channel = Channel(connected)
        self._channels.append(channel)
        self._selector.register(connected, selectors.EVENT_READ, lambda: self._hear(channel))

    def _hear(self, channel: Channel) -> None:
        messages: list[Message] | None = channel.receive(Message)
        if messages is None or any(message["attempt"] != self._name for message in messages):
            self._drop(channel)
            return
        for message in messages:
            if channel.rank is None:
                channel.rank = message["rank"]
                if self._order is not None:  # it has come late
                    channel.send(self._order)
            if "ending" in message:
                self._count(message["ending"])

    def _drop(self, channel: Channel) -> None:
        self._selector.unregister(channel.socket)
        channel.close()
        self._channels.remove(channel)
        if channel.rank is not None:
            self._roll.lost(channel.rank)

    def _count(self, ending: Ending) -> None:
        before = self._roll.failing
        self._roll.ended(ending, time.monotonic())
        if self._roll.failing and not before:
            grace = ending.get("grace", 0.0)
            self._roll.deadline = time.monotonic() + PATIENCE + grace
            self._give({"do": "end", "generation": self._roll.generation, "grace": grace})

    def _give(self, order: Command) -> None:
        """Give an order to all supervisors, this one included."""
        self._order = order
        for channel in self._channels:
            if channel.rank is not None:
                channel.send(order)
        self.orders.append(order)


class Member:
    """The part of any other supervisor."""

    def __init__(self, selector: selectors.BaseSelector, attempt: Attempt, address: tuple[str, int], rank: int) -> None:
        self.orders: deque[Command] = deque()
        self._selector, self._name, self._address, self._rank = selector, attempt.token, address, rank
        self._channel: Channel | None = None
        self._untold: list[Ending] = []
        self._until = math.inf  # the first try sets it: what is imported before may take minutes on a shared disk
        self._next_try = 0.0

    @property
    def stands(self) -> bool:
        """Whether orders may still come."""
        return self._channel is not None or time.monotonic() < self._until

    def tell(self, ending: Ending) -> bool:
        """Tell the chair how the worker ended, or once the chair is reached; return whether that is possible."""
        if self._channel is None:
            self._untold.append(ending)
            return self.stands
        return self._channel.send(self._message(ending))

    def tick(self) -> None:
        """Try to reach the chair."""
        now = time.monotonic()
        self._until = min(self._until, now + PATIENCE)
        if self._channel is not None or now >= self._until or now < self._next_try:
            return
        self._next_try = now + _RETRY
        try:
            self._channel = Channel(socket.create_connection(self._address, timeout=_CONNECT))
        except OSError:
            return
        self._selector.register(self._channel.socket, selectors.EVENT_READ, self._hear)
        for ending in [None, *self._untold]:
            self._channel.send(self._message(ending))

    def descriptors(self) -> list[int]:
        """Return the open descriptors, which a worker must not keep."""
        return [] if self._channel is None else [self._channel.socket.fileno()]

    def close(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            self._channel.close()

    def _message(self, ending: Ending | None) -> Message:
        message: Message = {"attempt": self._name, "rank": self._rank}
        if ending is not None:
            message["ending"] = ending
        return message

    def _hear(self) -> None:
        assert self._channel is not None
        orders = self._channel.receive(Command)
        if orders is not None:
            self.orders.extend(orders)
            return
        self._selector.unregister(self._channel.socket)
        self._channel.close()
        self._channel, self._until = None, 0.0
