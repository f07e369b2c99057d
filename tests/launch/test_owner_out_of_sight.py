"""Holders of a run directory that can't be looked at: on other machines, or where the queue gives no answer."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from launch import owner
from launch.owner import Owner, Superseded
from launch.slurm import scheduler
from launch.slurm.attempt import TOKEN, Attempt

LONG_AGO = (time.time() - 10_000,) * 2


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv(TOKEN, "")  # what a test sets is undone


def held_by(folder: Path, holder: Owner, *, spoke: tuple[float, float] | None) -> None:
    """A holder of long ago, whose run said something then or later."""
    owner.take(folder, holder)
    os.utime(folder / "owner.json", LONG_AGO)
    if spoke:
        (folder / "status.json").write_text("{}")
        os.utime(folder / "status.json", spoke)


@pytest.fixture(params=["elsewhere", "job"])
def held(request, tmp_path, monkeypatch) -> Owner:
    """One on another machine, and a job whose queue gives no answer."""

    def silent(jobs: list[str]) -> list[str]:
        raise scheduler.QueueError("squeue is not installed here")

    monkeypatch.setattr(scheduler, "alive", silent)
    return (
        Owner("far", "elsewhere", 1, "1") if request.param == "elsewhere" else owner.by_job(Attempt(tmp_path, "7", 0))
    )


def test_who_spoke_lately_is_alive(held, tmp_path):
    held_by(tmp_path, held, spoke=(time.time(), time.time()))
    with pytest.raises(ValueError, match="which is alive"):
        owner.take(tmp_path, owner.by_hand())


@pytest.mark.parametrize("spoke", [LONG_AGO, None])
def test_who_is_silent_for_long_is_taken_over(held, tmp_path, spoke):
    held_by(tmp_path, held, spoke=spoke)
    owner.take(tmp_path, owner.by_hand())
    owner.require(tmp_path)


def test_who_has_just_begun_and_said_nothing_yet_is_alive(held, tmp_path):
    owner.take(tmp_path, held)
    (tmp_path / "status.json").write_text("{}")  # of the run before
    os.utime(tmp_path / "status.json", LONG_AGO)
    with pytest.raises(ValueError, match="which is alive"):
        owner.take(tmp_path, owner.by_hand())


def test_a_start_takes_what_it_holds_already(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "alive", lambda jobs: jobs)
    mine = owner.by_job(Attempt(tmp_path, "7", 0))
    owner.take(tmp_path, mine)
    owner.take(tmp_path, dataclasses.replace(mine, pid=mine.pid + 1))
    owner.require(tmp_path)


def test_where_nobody_holds_it_nothing_is_written(tmp_path):
    owner.take(tmp_path, owner.by_hand())
    (tmp_path / "owner.json").unlink()
    with pytest.raises(Superseded, match="an unknown owner"):
        owner.require(tmp_path)


@pytest.mark.parametrize("text", ['{"token": "7_', '{"token": "7_0", "colour": "red"}', "[]"])
def test_a_damaged_owner_is_said_to_be(tmp_path, text):
    (tmp_path / "owner.json").write_text(text)
    with pytest.raises(ValueError, match=r"owner\.json is damaged .*: remove it"):
        owner.take(tmp_path, owner.by_hand())
