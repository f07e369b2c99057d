"""A supervisor's way to the first one, and what signals and orders find once a worker has ended."""

from __future__ import annotations

import os
import selectors
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.slurm import links, supervisor
from launch.slurm.attempt import Attempt
from launch.slurm.channel import Message
from launch.slurm.forked import Forked
from launch.slurm.links import PATIENCE, Member
from launch.slurm.supervisor import Supervisor

ATTEMPT = Attempt(Path("pretrain"), "12", 0)


class Clock:
    """Stands in for `time` where supervisors reckon."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(links, "time", clock)
    return clock


@pytest.fixture
def chair() -> Iterator[socket.socket]:
    """Where the first supervisor listens."""
    with socket.create_server(("localhost", 0)) as listener:
        listener.settimeout(20)
        yield listener


def member(address: tuple[str, int]) -> Member:
    return Member(selectors.DefaultSelector(), ATTEMPT, address, rank=3)


def test_imports_that_take_minutes_cost_no_patience(clock, chair):
    late = member(chair.getsockname())
    clock.now += 10 * PATIENCE  # 512 ranks import from one disk
    assert late.stands
    late.tick()
    with chair.accept()[0] as connected:
        assert links.Channel(connected).receive(Message) == [{"attempt": "12_0", "rank": 3}]
    late.close()


def test_patience_is_reckoned_from_the_first_try(clock, chair):
    address = chair.getsockname()
    chair.close()  # nobody listens
    alone = member(address)
    alone.tick()
    clock.now += PATIENCE - 1
    alone.tick()
    assert alone.stands
    clock.now += 1
    alone.tick()
    assert not alone.stands


def test_a_signal_for_a_worker_that_has_just_been_waited_for_is_no_error():
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os._exit(3)
    os.close(writer)
    worker = Forked(pid, reader)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert worker.poll() == 3
    worker.signal(signal.SIGTERM)
    assert worker.said() is None


def test_who_has_no_worker_to_kill_waits_for_news(monkeypatch):
    """A time to kill that has passed would have a supervisor look for news without a pause, until all have ended."""
    without, waits = Supervisor.__new__(Supervisor), []
    monkeypatch.setattr(
        without, "_selector", SimpleNamespace(select=lambda seconds: waits.append(seconds) or []), False
    )
    without.attempt, without._worker, without._kill_at = ATTEMPT, None, float("inf")
    without._follow({"do": "end", "generation": 0, "grace": 0.0})
    without._wait()
    assert waits == [supervisor._TICK]
