"""Owners that are other processes: at one moment, in another container, after a kill, with and without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launch import owner, record_lock, this_process
from launch.slurm import scheduler
from launch.slurm.attempt import TOKEN

ROOT = Path(__file__).parents[2]
HOLD = """
import errno, fcntl, sys
from pathlib import Path
folder, how, locks = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def refuse(*_):
    raise OSError(errno.ENOLCK, "no locks available")
if locks == "without locks":
    fcntl.flock = refuse
from launch import owner
if how == "at once":
    print("ready", flush=True)
    input()
part, parts = map(int, how.split("/")) if "/" in how else (0, 1)
try:
    with owner.holding(folder, part=part, parts=parts) if how != "train" else owner.training(folder):
        print("owns", flush=True)
        input()
except ValueError as error:
    print(error, flush=True)
"""
Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv(TOKEN, "")  # what a test sets is undone


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Return a function that starts a process, which owns a folder until it gets a line, and waits until it does."""
    children = []

    def start(folder: Path, how: str = "whole", locks: str = "with locks", prefix: tuple[str, ...] = ()):
        command = [*prefix, sys.executable, "-c", HOLD, str(folder), how, locks]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        child = subprocess.Popen(command, env=environment, **pipes)
        children.append(child)
        assert child.stdout.readline() == ("ready\n" if how == "at once" else "owns\n")
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()


def tell(child: subprocess.Popen[str]) -> None:
    child.stdin.write("\n")
    child.stdin.flush()


@pytest.mark.parametrize("locks", ["with locks", "without locks"])
def test_of_many_at_one_moment_one_becomes_the_owner(hold, tmp_path, locks):
    children = [hold(tmp_path, "at once", locks) for _ in range(6)]
    for child in children:
        tell(child)
    said = [child.stdout.readline() for child in children]
    winner = children[said.index("owns\n")]
    losers = [line for line in said if line != "owns\n"]
    assert len(losers) == 5
    for line in losers:
        assert line.startswith(f"{tmp_path} is in use by process {winner.pid} on ")
    tell(winner)
    winner.wait()
    assert list(tmp_path.iterdir()) == []  # neither a record nor a lock is left


def test_the_loser_is_told_who_owns_it_since_when_with_which_command_and_what_ends_it(hold, tmp_path):
    child = hold(tmp_path, "train")
    with pytest.raises(ValueError, match="in use by process") as told:
        owner.take(tmp_path, owner.by_hand())
    year = time.strftime("%Y")
    assert f"process {child.pid} on {owner.by_hand().host}, which is alive (since {year}-" in str(told.value)
    assert f"`-c {tmp_path} train 'with locks'`)" in str(told.value)
    assert str(told.value).endswith(f"wait for it, or end it with `kill {child.pid}`")


@pytest.mark.parametrize("how", ["train", "whole", "1/2"])
@pytest.mark.parametrize("locks", ["with locks", "without locks"])
def test_an_owner_that_was_killed_does_not_block_the_next(hold, tmp_path, how, locks):
    hold(tmp_path, how, locks).kill()
    begun = time.monotonic()
    hold(tmp_path, how, locks)
    assert time.monotonic() - begun < 20


def test_a_living_process_in_another_container_is_seen_by_its_lock(hold, tmp_path):
    apart = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("this user can't make pid namespaces")
    child = hold(tmp_path, "train", prefix=apart)
    held = owner.holder(tmp_path)
    assert held.pid != child.pid
    assert this_process.born(held.pid) != held.born
    with pytest.raises(ValueError, match=r"which is alive.*end it in its container"):
        owner.take(tmp_path, owner.by_hand())
    child.kill()
    child.wait()
    deadline = time.monotonic() + 10
    while record_lock.is_locked(tmp_path / "owner.json") and time.monotonic() < deadline:
        time.sleep(0.05)
    owner.take(tmp_path, owner.by_hand())


def test_without_locks_a_pid_of_another_container_is_judged_by_its_silence(tmp_path):
    foreign = replace(owner.by_hand(), token="foreign", pids="pid:[1]")  # a number of this container, by chance
    owner.take(tmp_path, foreign)
    with pytest.raises(ValueError, match="alive"):
        owner.take(tmp_path, owner.by_hand())
    os.utime(tmp_path / "owner.json", (0, time.time() - 1000))
    owner.take(tmp_path, owner.by_hand())


def test_a_pid_of_another_boot_says_nothing(tmp_path, monkeypatch):
    # another machine of the same name, or this one before it was restarted
    foreign = replace(owner.by_hand(), token="foreign", boot="another")
    owner.take(tmp_path, foreign)
    monkeypatch.setattr(this_process, "booted_at", lambda: time.time() - 3600)
    with pytest.raises(ValueError, match="alive"):
        owner.take(tmp_path, owner.by_hand())
    monkeypatch.setattr(this_process, "booted_at", lambda: time.time() + 1)
    owner.take(tmp_path, owner.by_hand())


def test_a_later_start_by_one_launcher_takes_over(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "alive", lambda jobs: jobs)
    first = replace(owner.by_hand(), token="first", host="node1", boot="its", launch="SLURM job 7", restart=0)
    owner.take(tmp_path, first)
    with pytest.raises(ValueError, match="alive"):
        owner.take(tmp_path, replace(first, token="beside"))
    with pytest.raises(ValueError, match="alive"):
        owner.take(tmp_path, replace(first, token="other", launch="SLURM job 8", restart=1))
    owner.take(tmp_path, replace(first, token="second", host="node2", restart=1))
    monkeypatch.setattr(scheduler, "alive", lambda jobs: [])
    owner.take(tmp_path, owner.by_hand())


@pytest.mark.parametrize(
    ("variables", "launch"),
    [
        ({}, ("", 0)),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}, ("", 0)),
        ({"TORCHELASTIC_RUN_ID": "mine", "TORCHELASTIC_RESTART_COUNT": "2"}, ("torchrun mine", 2)),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "7"}, ("SLURM job 7", 1)),
    ],
)
def test_the_launcher_is_known_by_what_it_sets(monkeypatch, variables, launch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert this_process.launch() == launch


def test_a_record_of_release_0_1_0_counts(tmp_path):
    me = owner.by_hand()
    fields = f'"host": "{me.host}", "pid": {me.pid}, "born": "{me.born}", "job": "", "restart": 0'
    (tmp_path / "owner.json").write_text(f'{{"token": "old", {fields}}}')
    with pytest.raises(ValueError, match="which is alive: wait for it"):
        owner.take(tmp_path, me)


def test_parts_have_owners_of_their_own(hold, tmp_path):
    hold(tmp_path, "0/2")
    with owner.holding(tmp_path, part=1, parts=2) as require_alone, pytest.raises(ValueError, match="in use"):
        require_alone()
    for part, parts in ((0, 2), (0, 3), (0, 1)):
        with pytest.raises(ValueError, match="in use"), owner.holding(tmp_path, part=part, parts=parts):
            pass
    whole = tmp_path / "whole"
    hold(whole)
    with pytest.raises(ValueError, match="in use"), owner.holding(whole, part=1, parts=2):
        pass


def test_an_owner_that_is_waited_for_is_named_once(hold, tmp_path):
    child = hold(tmp_path)
    said: list[str] = []

    def told(line: str) -> None:
        said.append(line)
        tell(child)

    with owner.holding(tmp_path, wait=told):
        assert child.wait() == 0
    assert len(said) == 1
    assert f"in use by process {child.pid}" in said[0]


def test_an_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "_BEAT", 0.01)
    with owner.holding(tmp_path):
        record = tmp_path / ".owner.json"
        os.utime(record, (0, 0))
        deadline = time.monotonic() + 10
        while record.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - record.stat().st_mtime < 60


def test_a_turn_that_does_not_come_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(record_lock, "_PATIENCE", 0.1)
    path = tmp_path / "turn"
    with record_lock.turn(path):
        with pytest.raises(ValueError, match="another process has held"), record_lock.turn(path):
            pass
        assert path.exists()
    assert not path.exists()


def test_without_locks_a_turn_of_a_killed_process_passes(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(record_lock, "_PATIENCE", 0.1)
    path = tmp_path / "turn"
    path.touch()
    with pytest.raises(ValueError, match="another process has held"), record_lock.turn(path):
        pass
    os.utime(path, (0, time.time() - 100))
    with record_lock.turn(path):
        assert path.exists()
    assert not path.exists()
