from __future__ import annotations

import pytest

from launch.slurm import scheduler
from launch.slurm.scheduler import JobState, QueueError


def test_states_of_jobs_and_of_an_array(slurm):
    slurm.answer(
        "squeue", "printf '12|12|RUNNING|node[1-2]|None\\n13|13_0|PENDING||Dependency\\n13|13_1|COMPLETED|n3|None\\n'"
    )
    slurm.answer("sacct", "echo 'slurm accounting is disabled' >&2; exit 1")
    found = scheduler.states(["12", "13", "14"])
    assert found["12"] == [JobState("12", "RUNNING", "node[1-2]")]
    assert found["13"] == [JobState("13_0", "PENDING", "", "Dependency"), JobState("13_1", "COMPLETED", "n3")]
    assert found["14"] == [JobState("14", "GONE")]
    assert len(slurm.calls("squeue")) == 1
    assert scheduler.alive(["12", "13", "14"]) == ["12", "13"]


def test_a_job_that_the_queue_has_forgotten_is_accounting_s(slurm):
    slurm.answer("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    slurm.answer("sacct", "echo '12|CANCELLED by 0'")
    assert scheduler.states(["12"])["12"][0].state == "CANCELLED"
    slurm.answer("sacct", "echo '12|RUNNING'")  # it is late
    assert not scheduler.states(["12"])["12"][0].alive


def test_accounting_is_asked_once_about_all_that_the_queue_has_forgotten(slurm):
    points = [f"7_{number}" for number in range(500)]
    known = "\n".join(f"7_{number}|{'FAILED' if number % 2 else 'COMPLETED'}" for number in range(499))
    slurm.answer("sacct", f"cat <<'END'\n{known}\n8_0|TIMEOUT\n8_1|COMPLETED\nEND")
    found = {job: state.state for job, [state] in scheduler.states([*points, "8", "9"]).items()}
    assert found == {
        **{job: "FAILED" if int(job[2:]) % 2 else "COMPLETED" for job in points[:499]},
        **{"7_499": "GONE", "8": "TIMEOUT", "9": "GONE"},
    }
    assert len(slurm.calls("sacct")) == 1


def test_a_controller_that_is_down_is_no_answer(slurm):
    slurm.answer("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(QueueError, match="Unable to contact"):
        scheduler.states(["12"])


def test_no_slurm_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QueueError, match="squeue is not installed here"):
        scheduler.alive(["12"])


def test_what_the_controller_knows(slurm):
    slurm.answer("scontrol", "echo 'JobId=12 JobState=RUNNING PreemptTime=None EndTime=2026-11-25T11:00:00'")
    assert scheduler.show("12") == {
        **{"JobId": "12", "JobState": "RUNNING", "PreemptTime": "None"},
        "EndTime": "2026-11-25T11:00:00",
    }
    slurm.answer("scontrol", "echo 'KillWait                = 45 sec'")
    assert scheduler.kill_wait() == 45
    slurm.answer("scontrol", "echo 'NodeName=n1 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=n1'")
    assert scheduler.address_of("n1") == "10.1.2.3"


def test_an_element_of_an_array_and_a_slow_answer(slurm, monkeypatch):
    slurm.answer("squeue", "echo '13|13_1|RUNNING|n3|None'")
    assert scheduler.states(["13_1"])["13_1"][0].state == "RUNNING"
    monkeypatch.setattr(scheduler, "_PATIENCE", 0.2)
    slurm.answer("squeue", "exec sleep 5")
    with pytest.raises(QueueError, match="gave no answer"):
        scheduler.states(["13"])


def test_a_controller_that_says_little(slurm):
    slurm.answer("scontrol", "echo 'nothing of it'")
    assert scheduler.kill_wait() == 30
    slurm.answer("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert scheduler.show("99") == {}
