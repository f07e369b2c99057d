"""A job's notice to leave, in time and over in time: the signals come to this very process."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from datetime import datetime

import pytest

from launch.slurm import deadline, scheduler
from launch.slurm.deadline import Notice, meaning

# a `leave` that can't end this process ends its thread
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

NOW = 1_800_000_000.0
RUNNING = {"JobState": "RUNNING", "PreemptTime": "None"}


class Job:
    """What the controller says of it, and whether its rank had to be left."""

    def __init__(self) -> None:
        self.left: list[tuple[float, str]] = []
        self.says: dict[str, str] = {}

    def preempted(self, seconds: float) -> float:
        """Sets the deadline; returns it."""
        end = time.time() + seconds
        self.says = RUNNING | {"PreemptTime": "2026-01-01T00:00:00", "EndTime": datetime.fromtimestamp(end).isoformat()}
        return end

    def leave(self, why: str):
        self.left.append((time.time(), why))
        raise SystemExit


@pytest.fixture
def job(monkeypatch) -> Job:
    job = Job()
    monkeypatch.setattr(scheduler, "show", lambda number: job.says)
    monkeypatch.setattr(scheduler, "kill_wait", lambda: 30.0)
    return job


def until(condition, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not (come := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return bool(come)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_the_flag_is_set_while_the_main_thread_hangs_where_python_runs_no_handler(job):
    job.preempted(600)
    stop, seen = Notice("1", grace=5, leave=job.leave), []
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)

    def other() -> None:
        time.sleep(0.2)  # until the main thread waits for the mutex that it holds, which no signal ends
        send(signal.SIGTERM)
        seen.append(until(stop, seconds=3))
        libc.pthread_mutex_unlock(mutex)

    with stop:
        libc.pthread_mutex_lock(mutex)
        threading.Thread(target=other).start()
        libc.pthread_mutex_lock(mutex)
    assert seen == [True]


def test_it_leaves_before_the_deadline_and_not_long_before(job):
    end = job.preempted(4.0)
    with Notice("1", grace=5, leave=job.leave):
        send(signal.SIGTERM)
        assert until(lambda: job.left)
    left, why = job.left[0]
    assert end - 2.0 < left < end - 0.3
    assert why == "was preempted, and no step ended in time"


def test_who_has_left_in_time_is_not_left_later(job):
    job.preempted(1.5)
    with Notice("1", grace=5, leave=job.leave) as stop:
        send(signal.SIGTERM)
        assert until(lambda: stop.has_less_than(60))  # the deadline is known
    assert until(lambda: not any(thread.name == "notice" for thread in threading.enumerate()), seconds=0.5)
    time.sleep(1.3)
    assert job.left == []


def test_signals_are_as_before_when_it_has_ended(job):
    handlers = [signal.getsignal(number) for number in Notice.signals]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    with Notice("1", grace=5, leave=job.leave):
        pass
    assert [signal.getsignal(number) for number in Notice.signals] == handlers
    assert signal.set_wakeup_fd(wakeup) == wakeup


def test_nobody_is_hurried_who_was_not_asked(job):
    with Notice("1", grace=5, leave=job.leave) as stop:
        assert not stop()
        assert not stop.has_less_than(1e9)


def test_a_later_signal_lengthens_nothing(job):
    job.preempted(300)
    with Notice("1", grace=5, leave=job.leave) as stop:
        send(signal.SIGTERM)
        assert until(lambda: stop.has_less_than(600))
        job.preempted(9000)
        send(signal.SIGUSR2)
        time.sleep(0.3)
        assert stop.has_less_than(600)


@pytest.mark.parametrize("error", [scheduler.QueueError("down"), ValueError("odd"), IndexError("nothing")])
def test_without_an_answer_it_leaves_within_the_grace(job, monkeypatch, error):
    def silent(number: str) -> dict[str, str]:
        raise error

    monkeypatch.setattr(scheduler, "show", silent)
    with Notice("1", grace=100, leave=job.leave) as stop:
        send(signal.SIGUSR2)
        assert until(lambda: stop.has_less_than(100))
        assert not stop.has_less_than(60)
        assert "does not answer" in stop.why


def test_the_reason_is_that_of_the_controller_though_its_answer_is_late(job, monkeypatch):
    job.preempted(600)
    show = scheduler.show
    monkeypatch.setattr(scheduler, "show", lambda number: time.sleep(0.5) or show(number))
    with Notice("1", grace=5, leave=job.leave) as stop:
        assert stop.reason() == "a signal"  # nobody has asked, so that it waits for no answer
        send(signal.SIGTERM)
        assert until(stop)
        assert stop.why == "a signal"
        assert stop.reason() == "was preempted"


def test_another_signal_is_no_notice(job):
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with Notice("1", grace=5, leave=job.leave, at_once=True) as stop:
            send(signal.SIGUSR1)
            time.sleep(0.2)
            assert not stop()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert job.left == []


@pytest.mark.parametrize(
    ("number", "end", "kill_wait", "why", "most"),
    [
        (signal.SIGUSR2, None, 30, "the time limit is near", 120),  # no limit is known: the grace is what there is
        (signal.SIGUSR2, 120 + 60, 30, "the time limit is near", 175),  # up to a minute early
        (signal.SIGTERM, 9000, 5, "was asked to end, or another rank died", 4.5),  # killed sooner than elsewhere
        (signal.SIGUSR2, 0.0, 30, "the time limit is near", 0.0),  # over already
    ],
)
def test_of_the_time_that_is_left_the_script_keeps_some(number, end, kill_wait, why, most):
    says = RUNNING if end is None else RUNNING | {"EndTime": datetime.fromtimestamp(NOW + end).isoformat()}
    told = meaning(number, says, now=NOW, grace=120, kill_wait=kill_wait)
    assert told.why == why
    assert 0.6 * most <= told.seconds <= most


@pytest.mark.parametrize("left", [4.0, 20.0, 120.0, 7200.0])
def test_a_rank_is_gone_before_its_deadline(left):
    says = RUNNING | {"PreemptTime": "2026-01-01T00:00:00", "EndTime": datetime.fromtimestamp(NOW + left).isoformat()}
    seconds = meaning(signal.SIGTERM, says, now=NOW, grace=120, kill_wait=30).seconds
    assert left - deadline._FOR_THE_SCRIPT <= seconds <= max(0.75 * left, left - deadline._FOR_THE_SCRIPT)
