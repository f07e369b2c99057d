from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time

import pytest

from launch import owner, this_process
from launch.owner import Owner, Superseded
from launch.slurm import scheduler
from launch.slurm.attempt import TOKEN, Attempt


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    yield
    os.environ.pop(TOKEN, None)


def by_job(folder, job: str, restart: int = 0) -> Owner:
    return owner.by_job(Attempt(folder, job, restart))


def test_one_at_a_time(tmp_path):
    owner.take(tmp_path, owner.by_hand())
    owner.require(tmp_path)
    other = dataclasses.replace(owner.by_hand(), token="another")
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on .*alive"):
        owner.take(tmp_path, other)
    owner.release(tmp_path, "another")
    assert owner.holder(tmp_path) is not None
    owner.release(tmp_path, owner.by_hand().token)
    assert owner.holder(tmp_path) is None
    owner.take(tmp_path, other)


def test_what_a_dead_one_held_is_taken_over_be_it_a_zombie_or_its_number_another_s(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    held = Owner("child", owner.by_hand().host, child.pid, this_process.born(child.pid))
    owner.take(tmp_path, held)
    with pytest.raises(ValueError, match="alive"):
        owner.take(tmp_path, owner.by_hand())
    child.kill()
    time.sleep(0.2)
    assert not owner.lives(held, tmp_path)  # nobody has waited for it
    child.wait()
    owner.take(tmp_path, owner.by_hand())
    assert not owner.lives(dataclasses.replace(owner.by_hand(), born="1"), tmp_path)


def test_on_another_machine_silence_tells(tmp_path):
    owner.take(tmp_path, Owner("far", "elsewhere", 1, "1"))
    with pytest.raises(ValueError, match="process 1 on elsewhere"):
        owner.take(tmp_path, owner.by_hand())
    os.utime(tmp_path / "owner.json", (0, time.time() - 1000))
    owner.take(tmp_path, owner.by_hand())


def test_of_jobs_the_queue_tells(tmp_path, monkeypatch):
    living = ["7"]
    monkeypatch.setattr(scheduler, "alive", lambda jobs: [job for job in jobs if job in living])
    owner.take(tmp_path, by_job(tmp_path, "7"))
    with pytest.raises(ValueError, match=r"in use by job 7, which is alive.*scancel 7"):
        owner.take(tmp_path, by_job(tmp_path, "8"))
    owner.take(tmp_path, by_job(tmp_path, "7", restart=1))  # itself, come back
    with pytest.raises(ValueError, match="alive"):
        owner.take(tmp_path, by_job(tmp_path, "7", restart=0))  # not the other way round
    living.clear()
    owner.take(tmp_path, by_job(tmp_path, "8"))


def test_who_was_replaced_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "alive", lambda jobs: [])
    owner.take(tmp_path, by_job(tmp_path, "7"))
    owner.require(tmp_path)
    mine = os.environ[TOKEN]
    owner.take(tmp_path, by_job(tmp_path, "7", restart=1))
    os.environ[TOKEN] = mine
    with pytest.raises(Superseded, match="taken over by job 7"):
        owner.require(tmp_path)


def test_whoever_holds_it_may_take_it_again(tmp_path):
    owner.take(tmp_path, owner.by_hand())
    owner.take(tmp_path, owner.by_hand())


def test_a_word_in_status_json_is_a_sign_of_life(tmp_path):
    owner.take(tmp_path, Owner("far", "elsewhere", 1, "1"))
    os.utime(tmp_path / "owner.json", (0, time.time() - 1000))
    (tmp_path / "status.json").write_text("{}")
    with pytest.raises(ValueError, match="alive"):
        owner.take(tmp_path, owner.by_hand())


def test_a_job_that_nobody_can_be_asked_about_is_judged_by_its_silence(tmp_path, monkeypatch):
    def down(jobs):
        raise scheduler.QueueError("down")

    monkeypatch.setattr(scheduler, "alive", down)
    owner.take(tmp_path, by_job(tmp_path, "7"))
    with pytest.raises(ValueError, match="alive"):
        owner.take(tmp_path, owner.by_hand())
    os.utime(tmp_path / "owner.json", (0, time.time() - 1000))
    owner.take(tmp_path, owner.by_hand())


def test_held_by_nobody_is_not_held_by_oneself(tmp_path):
    with pytest.raises(Superseded, match="an unknown owner"):
        owner.require(tmp_path)


def test_a_damaged_one_names_its_mend(tmp_path):
    (tmp_path / "owner.json").write_text('{"token": ')
    with pytest.raises(ValueError, match="remove it if nothing trains there"):
        owner.take(tmp_path, owner.by_hand())


def test_a_record_that_was_damaged_meanwhile_ends_no_work(tmp_path, caplog):
    with owner.training(tmp_path):
        (tmp_path / "owner.json").write_text("{")
    assert "owner.json" in caplog.text
