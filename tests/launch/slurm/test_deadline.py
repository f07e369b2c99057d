from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from launch.slurm.deadline import meaning

NOW = 1_800_000_000.0
RUNNING = {"JobState": "RUNNING", "PreemptTime": "None"}


def at(seconds: float) -> str:
    return datetime.fromtimestamp(NOW + seconds).isoformat()


def meant(number: int, job: dict[str, str]):
    return meaning(number, job, now=NOW, grace=120, kill_wait=30)


@pytest.mark.parametrize(
    ("number", "job", "why", "seconds"),
    [
        (signal.SIGUSR2, {**RUNNING, "EndTime": at(100)}, "the time limit is near", (80, 95)),
        (signal.SIGUSR2, {**RUNNING, "EndTime": at(180)}, "the time limit is near", (160, 175)),  # told early
        (signal.SIGUSR2, {**RUNNING, "EndTime": "Unknown"}, "the time limit is near", (100, 115)),
        (signal.SIGUSR2, {**RUNNING, "EndTime": at(9000)}, "was asked to requeue", (8000, 9000)),
        (signal.SIGTERM, {**RUNNING, "PreemptTime": at(0), "EndTime": at(20)}, "was preempted", (10, 19)),
        (signal.SIGTERM, {**RUNNING, "PreemptTime": at(0), "EndTime": at(0)}, "was preempted", (20, 30)),
        (signal.SIGTERM, {"JobState": "COMPLETING", "EndTime": at(0)}, "was cancelled", (20, 30)),
        (signal.SIGTERM, {**RUNNING, "EndTime": at(9000)}, "was asked to end, or another rank died", (5, 11)),
        (signal.SIGUSR2, {}, "got a signal, and SLURM's controller does not answer", (60, 120)),
        (signal.SIGTERM, {}, "got a signal, and SLURM's controller does not answer", (15, 30)),
    ],
)
def test_what_a_signal_means_is_the_controllers_to_tell(number, job, why, seconds):
    told = meant(number, job)
    assert told.why == why
    assert seconds[0] <= told.seconds <= seconds[1]


PROGRAM = """
import ctypes, os, signal, sys, time
from launch.slurm import deadline
from launch.signals import StopFlag
deadline.scheduler.show = lambda job: {"JobState": "RUNNING", "PreemptTime": "2027-01-01T00:00:00", "EndTime": END}
deadline.scheduler.kill_wait = lambda: 5.0
from datetime import datetime, timedelta
END = (datetime.now() + timedelta(seconds=2.4)).isoformat()
BEFORE
def leave(why):
    print("left", why, flush=True)
    os._exit(7)
with deadline.Notice("1", grace=5, leave=leave, at_once=AT_ONCE) as stop:
    os.kill(os.getpid(), signal.NUMBER)
    BODY
    AFTER
print("ended", flush=True)
"""


def run(
    body: str, *, at_once: bool = False, before: str = "", after: str = "", number: str = "SIGTERM"
) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.replace("BODY", body).replace("AT_ONCE", str(at_once)).replace("NUMBER", number)
    program = program.replace("BEFORE", before).replace("AFTER", after or "pass")
    root = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=os.environ | {"PYTHONPATH": root})


def test_it_leaves_for_a_rank_that_hangs_where_python_runs_no_handler():
    ended = run("ctypes.CDLL(None).usleep(20_000_000)")
    assert ended.returncode == 7
    assert "left was preempted, and no step ended" in ended.stdout


def test_it_does_not_where_the_loop_has_left_in_time():
    ended = run("time.sleep(0.5); assert stop(); assert not stop.has_less_than(0.5); assert stop.has_less_than(60)")
    assert (ended.returncode, ended.stdout) == (0, "ended\n"), ended.stderr


def test_what_has_no_loop_leaves_at_once():
    ended = run("ctypes.CDLL(None).usleep(20_000_000)", at_once=True)
    assert (ended.returncode, ended.stdout) == (7, "left received SIGTERM\n")


def test_a_later_signal_may_shorten_the_time():
    before = "soon, END = END, (datetime.now() + timedelta(seconds=900)).isoformat()"
    body = "time.sleep(0.3); assert not stop.has_less_than(600); END = soon; "
    body += "os.kill(os.getpid(), signal.SIGTERM); ctypes.CDLL(None).usleep(20_000_000)"
    ended = run(body, before=before, number="SIGUSR2")
    assert ended.returncode == 7, ended.stderr
    assert "left was preempted" in ended.stdout


def test_it_is_gone_before_a_short_kill_wait():
    assert meaning(signal.SIGTERM, {**RUNNING, "EndTime": at(9000)}, now=NOW, grace=120, kill_wait=5).seconds < 5


def test_a_later_signal_does_not_lengthen_it():
    body = "time.sleep(0.3); END = (datetime.now() + timedelta(seconds=900)).isoformat(); "
    body += "os.kill(os.getpid(), signal.SIGUSR2); ctypes.CDLL(None).usleep(20_000_000)"
    assert run(body).returncode == 7


def test_the_flag_is_set_while_python_runs_no_handler():
    body = "import threading; signal.signal(signal.SIGTERM, lambda *_: None); "  # as if it did not come to run
    body += "threading.Timer(0.5, lambda: print('asked', stop(), flush=True)).start(); "
    body += "ctypes.CDLL(None).usleep(20_000_000)"
    assert "asked True" in run(body).stdout


def test_without_an_answer_it_reckons_with_what_is_usual():
    program = "def silent(job): raise deadline.scheduler.QueueError('down')\ndeadline.scheduler.show = silent\n"
    body = (
        "time.sleep(0.5); assert stop.has_less_than(29); assert not stop.has_less_than(20); print(stop.why, flush=True)"
    )
    ended = run(body, before=program)
    assert "controller does not answer" in ended.stdout, ended.stderr


def test_other_signals_are_not_heeded():
    program = "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
    body = "time.sleep(0.2)"
    ended = run(body, before=program, number="SIGUSR1", after="assert not stop()")
    assert (ended.returncode, ended.stdout) == (0, "ended\n"), ended.stderr


def test_a_signal_that_comes_twice_asks_the_controller_once():
    program = """
shown, waits = [], []
show = deadline.scheduler.show
deadline.scheduler.show = lambda job: shown.append(job) or show(job)
deadline.scheduler.kill_wait = lambda: waits.append(1) or 5.0
"""
    body = "time.sleep(0.3); os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.3); assert len(shown) == 1, shown; "
    body += "os.kill(os.getpid(), signal.SIGUSR2); time.sleep(0.3); assert len(shown) == 2, shown; "
    body += "deadline._SAME = 0; os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.3); assert len(shown) == 3, shown; "
    ended = run(body + "assert len(waits) == 1", before=program)
    assert (ended.returncode, ended.stdout) == (0, "ended\n"), ended.stderr
