"""Answers of SLURM's that are late, short, or about a part of an array."""

from __future__ import annotations

import time

import pytest

from launch.slurm import scheduler
from launch.slurm.scheduler import JobState, QueueError


def test_a_command_that_hangs_is_no_answer(slurm, monkeypatch):
    monkeypatch.setattr(scheduler, "_PATIENCE", 0.3)
    slurm.answer("squeue", "exec sleep 30")
    began = time.monotonic()
    with pytest.raises(QueueError, match="is the controller down"):
        scheduler.states(["12"])
    assert time.monotonic() - began < 10


def test_one_element_of_an_array(slurm):
    slurm.answer("squeue", "printf '13|13_0|RUNNING|n1|None\\n13|13_1|FAILED||None\\n'")
    assert scheduler.states(["13_1"]) == {"13_1": [JobState("13_1", "FAILED")]}
    assert scheduler.alive(["13_0", "13_1"]) == ["13_0"]


@pytest.mark.parametrize(
    "state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "REQUEUED", "STOPPED"]
)
def test_what_may_still_run_is_alive(state):
    assert JobState("12", state).alive


@pytest.mark.parametrize("state", ["COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "GONE"])
def test_what_has_ended_is_not(state):
    assert not JobState("12", state).alive


def test_nothing_is_asked_about_no_jobs(slurm):
    assert scheduler.states([]) == {}
    assert slurm.calls("squeue") == []


def test_a_job_that_the_controller_has_forgotten_is_empty(slurm):
    slurm.answer("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert scheduler.show("12") == {}


def test_what_the_configuration_does_not_say_is_slurm_s_default(slurm):
    slurm.answer("scontrol", "echo 'SlurmUser = slurm'")
    assert scheduler.kill_wait() == 30
    assert scheduler.address_of("n1") == "n1"


def test_names_of_nodes(slurm):
    slurm.answer("scontrol", "printf 'gpu1\\ngpu2\\n'")
    assert scheduler.hostnames("gpu[1-2]") == ["gpu1", "gpu2"]
    assert slurm.calls("scontrol") == ["show hostnames gpu[1-2]"]


def test_a_refusal_is_told_in_slurm_s_words(slurm):
    slurm.answer("scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    with pytest.raises(QueueError, match=r"scontrol requeue 12 failed: Requested operation is presently disabled"):
        scheduler.control("requeue", "12")
