from __future__ import annotations

import os
import signal

import pytest

from launch import signals
from launch.signals import StopFlag


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_sets_the_flag_and_handlers_come_back(number):
    at_first = signal.signal(number, signal.SIG_DFL)  # also where the tests run under nohup
    try:
        with StopFlag() as stop:
            assert not stop()
            os.kill(os.getpid(), number)
            assert stop()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, at_first)


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_press_of_ctrl_c_may_come_twice_and_a_second_press_interrupts(monkeypatch):
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        monkeypatch.setattr(signals, "_ONE_PRESS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
